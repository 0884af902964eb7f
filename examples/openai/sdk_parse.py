# pip install openai; with OPENAI_BASE_URL and OPENAI_API_KEY as `orchd openai` prints them
from openai import OpenAI
from pydantic import BaseModel, Field


class River(BaseModel):
    name: str = Field(max_length=40)
    length_km: int = Field(ge=1, le=9999)


messages = [{"role": "user", "content": "Describe a river in Europe as JSON with name and length_km."}]
answer = OpenAI().chat.completions.parse(model="default", messages=messages, response_format=River)
print(answer.choices[0].message.parsed)
