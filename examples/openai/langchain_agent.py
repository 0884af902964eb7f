# pip install langchain langchain-openai; with OPENAI_BASE_URL and OPENAI_API_KEY as `orchd openai` prints them
from langchain.agents import create_agent
from langchain_openai import ChatOpenAI


def water_level(river: str) -> str:
    """Tell the water level of a river."""
    return f"The {river} stands at 2.31 m."


agent = create_agent(ChatOpenAI(model="default"), tools=[water_level])
answer = agent.invoke({"messages": [{"role": "user", "content": "How high is the water of the Rhine?"}]})
print(answer["messages"][-1].content)
