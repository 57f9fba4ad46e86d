"""The quickstart's chats: capitals, continents, languages and currencies of 45 countries, from facts and phrasings.

Each question is there in three styles: under a system message that asks for few words, under one that asks for full
sentences, and without a system message, which is answered in a full sentence too. A sixth of the pairs of country and
phrasing is held out: the score shows memory and rephrasing, not new knowledge.
`python configs/quickstart/capitals.py` writes the tokenizer and the model's configuration beside this file again.
"""

import random
from pathlib import Path

from data import TaskDataSpec

# country: capital, continent, language, currency; as they are written inside a sentence
FACTS = """
France: Paris, Europe, French, euro | Spain: Madrid, Europe, Spanish, euro | Italy: Rome, Europe, Italian, euro
Germany: Berlin, Europe, German, euro | Portugal: Lisbon, Europe, Portuguese, euro | Greece: Athens, Europe, Greek, euro
Poland: Warsaw, Europe, Polish, zloty | Sweden: Stockholm, Europe, Swedish, krona | Norway: Oslo, Europe, Norwegian, krone
Denmark: Copenhagen, Europe, Danish, krone | Finland: Helsinki, Europe, Finnish, euro | Hungary: Budapest, Europe, Hungarian, forint
Austria: Vienna, Europe, German, euro | Ireland: Dublin, Europe, English, euro | Iceland: Reykjavik, Europe, Icelandic, krona
Ukraine: Kyiv, Europe, Ukrainian, hryvnia | Romania: Bucharest, Europe, Romanian, leu | Bulgaria: Sofia, Europe, Bulgarian, euro
the Netherlands: Amsterdam, Europe, Dutch, euro | the United Kingdom: London, Europe, English, pound | Egypt: Cairo, Africa, Arabic, pound
Morocco: Rabat, Africa, Arabic, dirham | Kenya: Nairobi, Africa, Swahili, shilling | Ghana: Accra, Africa, English, cedi
Senegal: Dakar, Africa, French, franc | Ethiopia: Addis Ababa, Africa, Amharic, birr | Tunisia: Tunis, Africa, Arabic, dinar
Japan: Tokyo, Asia, Japanese, yen | China: Beijing, Asia, Chinese, yuan | India: New Delhi, Asia, Hindi, rupee
Thailand: Bangkok, Asia, Thai, baht | Vietnam: Hanoi, Asia, Vietnamese, dong | Mongolia: Ulaanbaatar, Asia, Mongolian, tugrik
Iran: Tehran, Asia, Persian, rial | Iraq: Baghdad, Asia, Arabic, dinar | Jordan: Amman, Asia, Arabic, dinar
Peru: Lima, South America, Spanish, sol | Chile: Santiago, South America, Spanish, peso | Brazil: Brasilia, South America, Portuguese, real
Colombia: Bogota, South America, Spanish, peso | Ecuador: Quito, South America, Spanish, dollar | Cuba: Havana, North America, Spanish, peso
Jamaica: Kingston, North America, English, dollar | Canada: Ottawa, North America, English, dollar | the United States: Washington, North America, English, dollar
"""  # noqa: E501

QUESTIONS = {
    "capital": [
        "What is the capital of {c}?", "Name the capital of {c}.", "Which city is the capital of {c}?",
        "Tell me the capital of {c}, please.", "Do you know the capital of {c}?", "What's the capital city of {c}?",
        "I forgot the capital of {c}.", "The capital of {c} is called what?", "Which capital belongs to {c}?",
        "{c} has which capital?", "What is the name of the capital of {c}?", "Quiz: the capital of {c}?",
    ],
    "continent": [
        "On which continent is {c}?", "Which continent is {c} part of?", "Name the continent of {c}.",
        "Where in the world is {c}?", "Tell me the continent of {c}, please.", "{c} is on which continent?",
        "Quiz: the continent of {c}?", "Which continent does {c} lie on?", "I forgot the continent of {c}.",
        "Do you know the continent of {c}?", "To which continent does {c} belong?", "Where on the globe is {c}?",
    ],
    "language": [
        "Which language is spoken in {c}?", "What do people speak in {c}?", "Name the language of {c}.",
        "Tell me the language of {c}, please.", "The language of {c} is what?", "Quiz: the language of {c}?",
        "I forgot the language of {c}.", "Do you know the language of {c}?", "What language is used in {c}?",
        "Which language would I hear in {c}?", "Which language do they speak in {c}?", "What should I speak in {c}?",
    ],
    "currency": [
        "Which currency is used in {c}?", "What do people pay with in {c}?", "Name the currency of {c}.",
        "Tell me the currency of {c}, please.", "The currency of {c} is what?", "Quiz: the currency of {c}?",
        "I forgot the currency of {c}.", "Do you know the currency of {c}?", "What money is used in {c}?",
        "Which money would I need in {c}?", "Which money do they have in {c}?", "What is the money of {c} called?",
    ],
}  # fmt: skip
FOLLOW_UPS = {
    "capital": ["And the capital?", "What about its capital?", "Its capital?"],
    "continent": ["And the continent?", "What about its continent?", "Its continent?"],
    "language": ["And the language?", "What about its language?", "Its language?"],
    "currency": ["And the currency?", "What about its currency?", "Its currency?"],
}
FULL_SENTENCES = {
    "capital": "The capital of {c} is {a}.",
    "continent": "{c} lies in {a}.",
    "language": "People in {c} speak {a}.",
    "currency": "People in {c} pay with the {a}.",
}
SHORT, LONG = "Answer in as few words as you can.", "Answer in full sentences."
STYLES = (SHORT, LONG, None)  # the system messages; None: no system message, and full sentences
FOLDER = Path(__file__).parent


def facts() -> dict[str, dict[str, str]]:
    """The answer to each relation of each country."""
    entries = [entry.split(":") for line in FACTS.strip().splitlines() for entry in line.split("|")]
    return {
        country.strip(): dict(zip(QUESTIONS, [answer.strip() for answer in answers.split(",")], strict=True))
        for country, answers in entries
    }


def fill_in(sentence: str, country: str, answer: str = "") -> str:
    """The sentence with its country and answer, and a capital letter in front: "The Netherlands lies in Europe."."""
    filled = sentence.format(c=country, a=answer)
    return filled[0].upper() + filled[1:]


class Capitals:
    """Chats of one or two turns in three styles."""

    def __init__(self, seed: int = 0):
        rng = random.Random(seed)
        self.formatted_ds = {"train": [], "validation": []}
        for country, answers in facts().items():
            for relation, phrasings in QUESTIONS.items():
                for phrasing in phrasings:
                    split = "validation" if rng.random() < 1 / 6 else "train"
                    for system in STYLES:
                        chat = self.chat(rng, country, answers, relation, phrasing, system)
                        self.formatted_ds[split].append({"messages": chat})
        for conversations in self.formatted_ds.values():
            rng.shuffle(conversations)
        self.task_spec = TaskDataSpec("capitals")

    def chat(self, rng, country: str, answers: dict, relation: str, phrasing: str, system: str | None) -> list[dict]:
        turns = [(relation, phrasing)]
        if rng.random() < 0.7:
            following = rng.choice([other for other in QUESTIONS if other != relation])
            turns.append((following, rng.choice(FOLLOW_UPS[following])))
        messages = [{"role": "system", "content": system}] if system else []
        for relation, question in turns:
            sentence = "{a}." if system == SHORT else FULL_SENTENCES[relation]
            messages.append({"role": "user", "content": fill_in(question, country)})
            messages.append({"role": "assistant", "content": fill_in(sentence, country, answers[relation])})
        return messages


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_tokenizer_and_model_configuration():
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    conversations = [row["messages"] for rows in Capitals().formatted_ds.values() for row in rows]
    texts = [message["content"] for messages in conversations for message in messages]
    bpe = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(texts, vocab_size=1024, special_tokens=special, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>", pad_token=special[0])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:2]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(FOLDER)
    LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(FOLDER)  # fmt: skip


if __name__ == "__main__":
    write_tokenizer_and_model_configuration()
