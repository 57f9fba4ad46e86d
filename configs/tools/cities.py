"""Chats in which the assistant calls a function for the weather or the time of a city, and reports its result.

A sixth of the pairs of city and phrasing is held out, and those chats end with the call or with the answer that reports
its result: the score shows whether the right function is called with the right city, and whether the result is read.
"""

import json
import random

from data import TaskDataSpec

CITIES = (
    "Paris Madrid Rome Berlin Lisbon Athens Warsaw Stockholm Oslo Copenhagen Helsinki Budapest Vienna Dublin Reykjavik "
    "Kyiv Sofia Cairo Nairobi Accra Dakar Tunis Tokyo Beijing Bangkok Tehran Baghdad Lima Santiago Bogota Quito Havana "
    "Kingston Ottawa"
).split()
QUESTIONS = {
    "get_weather": [
        "What is the weather in {c}?", "How warm is it in {c}?", "Is it cold in {c}?", "Tell me the weather in {c}.",
        "Do I need a coat in {c}?", "The weather in {c}, please.",
    ],
    "get_time": [
        "What time is it in {c}?", "Is it late in {c}?", "Tell me the time in {c}.", "How late is it in {c}?",
        "Do people in {c} sleep now?", "The time in {c}, please.",
    ],
}  # fmt: skip
ANSWERS = {"get_weather": "It is {r} degrees in {c}.", "get_time": "It is {r} o'clock in {c}."}
RESULTS = {"get_weather": "degrees", "get_time": "hour"}


def tool(name: str, description: str) -> dict:
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": city}}


TOOLS = [tool("get_weather", "The weather of a city."), tool("get_time", "The time in a city.")]


class Cities:
    """Conversations with tools. A call is {"type": "function", "function": {"name": ..., "arguments": {...}}}."""

    def __init__(self, seed: int = 0):
        rng = random.Random(seed)
        self.formatted_ds = {"train": [], "validation": []}
        for city in CITIES:
            for name, phrasings in QUESTIONS.items():
                for phrasing in phrasings:
                    split = "validation" if rng.random() < 1 / 6 else "train"
                    chat = self.chat(name, phrasing, city, rng.randrange(1, 25))
                    if split == "validation" and rng.random() < 0.5:
                        chat = chat[:2]
                    self.formatted_ds[split].append({"messages": chat, "tools": TOOLS})
        for conversations in self.formatted_ds.values():
            rng.shuffle(conversations)
        self.task_spec = TaskDataSpec("cities")

    def chat(self, name: str, phrasing: str, city: str, result: int) -> list[dict]:
        call = {"type": "function", "function": {"name": name, "arguments": {"city": city}}}
        return [
            {"role": "user", "content": phrasing.format(c=city)},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": json.dumps({RESULTS[name]: result})},
            {"role": "assistant", "content": ANSWERS[name].format(c=city, r=result)},
        ]
