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
TOKEN_FILE = Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local/state")) / "orchd/token"


def main(question: str) -> None:
    token = os.environ.get("ORCHD_TOKEN") or TOKEN_FILE.read_text().strip()
    with httpx.Client(base_url=URL, headers={"Authorization": f"Bearer {token}"}) as http:
        answer = http.post("/v1/tasks", json={"messages": [{"role": "user", "content": question}], "max_tokens": 64})
        if answer.status_code != 202:
            sys.exit(refusal(answer))
        task_id = answer.json()["task_id"]

        # The server sends at least a comment every 15 s, so 40 s of silence mean that the connection is broken.
        with http.stream("GET", f"/v1/tasks/{task_id}/stream", timeout=httpx.Timeout(5, read=40)) as stream:
            if stream.status_code != 200:
                stream.read()
                sys.exit(refusal(stream))
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
                    sys.exit(end["error"]["message"] if "error" in end else 0)
    sys.exit("the stream ended before the task did")


def refusal(answer: httpx.Response) -> str:
    """What the server's error envelope says: always code, message, engine."""
    try:
        error = answer.json()
        return f"{error['code']}: {error['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{URL} does not answer like orchd (status {answer.status_code})"


if __name__ == "__main__":
    try:
        main(" ".join(sys.argv[1:]) or "Name three rivers.")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError:
        sys.exit(f"no token in {TOKEN_FILE}; start the server once with `orchd serve`, or set ORCHD_TOKEN")
    except httpx.ConnectError as error:
        sys.exit(f"no answer from {URL} ({error}); is `orchd serve` running there?")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        sys.exit(f"the connection to {URL} failed: {error or type(error).__name__}")
