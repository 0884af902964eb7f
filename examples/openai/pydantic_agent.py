# pip install 'pydantic-ai-slim[openai]'; with OPENAI_BASE_URL and OPENAI_API_KEY as `orchd openai` prints them
from pydantic import BaseModel, Field
from pydantic_ai import Agent


class River(BaseModel):
    name: str = Field(max_length=40)
    length_km: int = Field(ge=1, le=9999)


agent = Agent("openai-chat:default", output_type=River)
print(agent.run_sync("Describe a river in Europe.").output)
