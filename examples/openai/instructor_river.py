# pip install instructor; with OPENAI_BASE_URL and OPENAI_API_KEY as `orchd openai` prints them
import instructor
from openai import OpenAI
from pydantic import BaseModel, Field


class River(BaseModel):
    name: str = Field(max_length=40)
    length_km: int = Field(ge=1, le=9999)


client = instructor.from_openai(OpenAI())
messages = [{"role": "user", "content": "Describe a river in Europe."}]
print(client.chat.completions.create(model="default", messages=messages, response_model=River))
