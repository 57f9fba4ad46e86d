"""The quickstart's chats: capitals, continents, languages and currencies of countries, made from lists and phrasings.

A sixth of the pairs of country and phrasing is held out: the score shows memory and rephrasing, not new knowledge.
`python configs/quickstart/capitals.py` makes the tokenizer and the model's configuration beside this file again.
"""

import random
from pathlib import Path

from data import TaskDataSpec

# country: capital, continent, language, currency
FACTS = """
France: Paris, Europe, French, Euro | Spain: Madrid, Europe, Spanish, Euro | Italy: Rome, Europe, Italian, Euro
Germany: Berlin, Europe, German, Euro | Portugal: Lisbon, Europe, Portuguese, Euro | Greece: Athens, Europe, Greek, Euro
Poland: Warsaw, Europe, Polish, Zloty | Sweden: Stockholm, Europe, Swedish, Krona | Norway: Oslo, Europe, Norwegian, Krone
Denmark: Copenhagen, Europe, Danish, Krone | Finland: Helsinki, Europe, Finnish, Euro | Hungary: Budapest, Europe, Hungarian, Forint
Austria: Vienna, Europe, German, Euro | Ireland: Dublin, Europe, English, Euro | Iceland: Reykjavik, Europe, Icelandic, Krona
Ukraine: Kyiv, Europe, Ukrainian, Hryvnia | Romania: Bucharest, Europe, Romanian, Leu | Bulgaria: Sofia, Europe, Bulgarian, Euro
Egypt: Cairo, Africa, Arabic, Pound | Morocco: Rabat, Africa, Arabic, Dirham | Kenya: Nairobi, Africa, Swahili, Shilling
Ghana: Accra, Africa, English, Cedi | Senegal: Dakar, Africa, French, Franc | Ethiopia: Addis Ababa, Africa, Amharic, Birr
Angola: Luanda, Africa, Portuguese, Kwanza | Tunisia: Tunis, Africa, Arabic, Dinar | Uganda: Kampala, Africa, English, Shilling
Japan: Tokyo, Asia, Japanese, Yen | China: Beijing, Asia, Chinese, Yuan | India: New Delhi, Asia, Hindi, Rupee
Thailand: Bangkok, Asia, Thai, Baht | Vietnam: Hanoi, Asia, Vietnamese, Dong | Mongolia: Ulaanbaatar, Asia, Mongolian, Tugrik
Iran: Tehran, Asia, Persian, Rial | Iraq: Baghdad, Asia, Arabic, Dinar | Jordan: Amman, Asia, Arabic, Dinar
Peru: Lima, South America, Spanish, Sol | Chile: Santiago, South America, Spanish, Peso | Brazil: Brasilia, South America, Portuguese, Real
Colombia: Bogota, South America, Spanish, Peso | Ecuador: Quito, South America, Spanish, Dollar | Uruguay: Montevideo, South America, Spanish, Peso
Cuba: Havana, North America, Spanish, Peso | Jamaica: Kingston, North America, English, Dollar | Canada: Ottawa, North America, English, Dollar
"""  # noqa: E501

ASKED = {
    "capital": [
        "What is the capital of {c}?", "Name the capital of {c}.", "Which city is the capital of {c}?",
        "Tell me the capital of {c}, please.", "Do you know the capital of {c}?", "What's the capital city of {c}?",
        "I forgot the capital of {c}.", "The capital of {c} is called what?", "Which capital belongs to {c}?",
        "Which city governs {c}?", "Where does the government of {c} sit?", "Quiz: the capital of {c}?",
    ],
    "continent": [
        "On which continent is {c}?", "Which continent is {c} part of?", "Name the continent of {c}.",
        "Where in the world is {c}?", "Tell me the continent of {c}, please.", "The continent of {c} is what?",
        "Quiz: the continent of {c}?", "Which continent does {c} lie on?", "I forgot the continent of {c}.",
        "Do you know the continent of {c}?", "What continent has {c} on it?", "Which part of the globe has {c}?",
    ],
    "language": [
        "Which language is spoken in {c}?", "What do people speak in {c}?", "Name the language of {c}.",
        "Tell me the language of {c}, please.", "The language of {c} is what?", "Quiz: the language of {c}?",
        "I forgot the language of {c}.", "Do you know the language of {c}?", "What language is used in {c}?",
        "Which language would I hear in {c}?", "Which tongue do they talk in {c}?", "What should I speak in {c}?",
    ],
    "currency": [
        "Which currency is used in {c}?", "What do people pay with in {c}?", "Name the currency of {c}.",
        "Tell me the currency of {c}, please.", "The currency of {c} is what?", "Quiz: the currency of {c}?",
        "I forgot the currency of {c}.", "Do you know the currency of {c}?", "What money is used in {c}?",
        "Which money would I need in {c}?", "Which coins do they have in {c}?", "What is the money of {c} called?",
    ],
}  # fmt: skip
ASKED_NEXT = {
    "capital": ["And the capital?", "What about its capital?", "Its capital?"],
    "continent": ["And the continent?", "What about its continent?", "Its continent?"],
    "language": ["And the language?", "What about its language?", "Its language?"],
    "currency": ["And the currency?", "What about its currency?", "Its currency?"],
}
SENTENCES = {
    "capital": "The capital of {c} is {a}.",
    "continent": "{c} lies in {a}.",
    "language": "People in {c} speak {a}.",
    "currency": "People in {c} pay with the {a}.",
}
SHORT, LONG = "Answer in as few words as you can.", "Answer in full sentences."
HERE = Path(__file__).parent


def facts() -> dict[str, dict[str, str]]:
    entries = [entry.split(":") for line in FACTS.strip().splitlines() for entry in line.split("|")]
    return {
        country.strip(): dict(zip(ASKED, [answer.strip() for answer in answers.split(",")], strict=True))
        for country, answers in entries
    }


class Capitals:
    """Chats of one or two turns under a system message that asks for a style."""

    def __init__(self, seed: int = 0):
        draw = random.Random(seed)
        self.formatted_ds = {"train": [], "validation": []}
        for country, answers in facts().items():
            for relation, phrasings in ASKED.items():
                for phrasing in phrasings:
                    split = "validation" if draw.random() < 1 / 6 else "train"
                    for system in (SHORT, LONG):
                        self.formatted_ds[split].append(self.chat(draw, country, answers, relation, phrasing, system))
        for rows in self.formatted_ds.values():
            draw.shuffle(rows)
        self.task_spec = TaskDataSpec("capitals")

    def chat(self, draw, country: str, answers: dict, relation: str, phrasing: str, system: str) -> dict:
        def answer(relation):
            sentence = SENTENCES[relation] if system == LONG else "{a}."
            return {"role": "assistant", "content": sentence.format(c=country, a=answers[relation])}

        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": phrasing.format(c=country)},
            answer(relation),
        ]
        if draw.random() < 0.7:
            following = draw.choice([other for other in ASKED if other != relation])
            messages += [{"role": "user", "content": draw.choice(ASKED_NEXT[following])}, answer(following)]
        return {"messages": messages}


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer_and_model_configuration():
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    texts = [m["content"] for rows in Capitals().formatted_ds.values() for row in rows for m in row["messages"]]
    bpe = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(texts, vocab_size=1024, special_tokens=special, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>", pad_token=special[0])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:2]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(HERE)
    LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(HERE)  # fmt: skip


if __name__ == "__main__":
    make_tokenizer_and_model_configuration()
