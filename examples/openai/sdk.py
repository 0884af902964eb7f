# pip install openai; with OPENAI_BASE_URL and OPENAI_API_KEY as `orchd openai` prints them
from openai import OpenAI

client = OpenAI()
messages = [{"role": "user", "content": "Name a river in Europe."}]
for chunk in client.chat.completions.create(model="default", messages=messages, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
