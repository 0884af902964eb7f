"""Asks a question with plain httpx: two requests and a dozen lines that read the stream.

pip install httpx
python examples/python_httpx.py "Name three rivers."
"""

import json
import os
import sys
from pathlib import Path

import httpx

URL = os.environ.get("ORCHD_URL", "http://127.0.0.1:8737")
STATE = Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local/state"))
TOKEN = os.environ.get("ORCHD_TOKEN") or (STATE / "orchd/token").read_text().strip()


def main(question: str) -> None:
    with httpx.Client(base_url=URL, headers={"Authorization": f"Bearer {TOKEN}"}) as http:
        answer = http.post("/v1/tasks", json={"messages": [{"role": "user", "content": question}], "max_tokens": 64})
        if answer.status_code != 202:
            error = answer.json()  # always code, message, engine
            sys.exit(f"{error['code']}: {error['message']}")
        task_id = answer.json()["task_id"]

        # The server sends at least a comment every 15 s, so 40 s of silence mean that the connection is broken.
        with http.stream("GET", f"/v1/tasks/{task_id}/stream", timeout=httpx.Timeout(5, read=40)) as stream:
            stream.raise_for_status()
            kind = ""
            for line in stream.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    kind = value
                elif name == "data" and kind == "token":
                    print(json.loads(value)["t"], end="", flush=True)
                elif name == "data" and kind == "end":
                    end = json.loads(value)
                    print(f"\n[{end['finish_reason']}, {end['tokens_out']} tokens]")
                    if "error" in end:
                        sys.exit(f"{end['error']['code']}: {end['error']['message']}")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "Name three rivers.")
