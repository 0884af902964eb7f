"""Asks a question with orchd's own client and prints the answer as it comes.

    python examples/python_client.py "Name three rivers."

On the same machine and account as `orchd serve`, the client finds the address and the token by itself. Elsewhere, use
`Client("http://127.0.0.1:8737", token="...")`.
"""

import asyncio
import sys

from orchd.client import Client, OrchdError


async def main(question: str) -> None:
    async with Client() as client:
        answer = client.run(
            messages=[{"role": "user", "content": question}],
            max_tokens=64,
            max_wait_s=30,  # if the queue is full, wait as long as the server says, at most 30 s in total
            on_wait=lambda refusal, pause_s: print(refusal, file=sys.stderr),
        )
        async for text in answer:
            print(text, end="", flush=True)
        print()


if __name__ == "__main__":
    try:
        asyncio.run(main(" ".join(sys.argv[1:]) or "Name three rivers."))
    except KeyboardInterrupt:
        sys.exit(130)
    except OrchdError as error:  # every error of the client; each message says what to do
        sys.exit(str(error))
