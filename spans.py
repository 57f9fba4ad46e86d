"""Where the turns of the assistant begin and end in a rendered chat. The rules, with an example: docs/masks.md."""

import itertools
import re

import tracing


def turn_spans(chat, i: int) -> list[tuple[int, int, int]]:
    """The trained spans of assistant message i: one, or several where answers of tools stand within its turn."""
    own = [k for k, segment in enumerate(chat.segments) if segment.printer == i]
    for segment in chat.segments:
        if segment.printer != i and segment.source == i and not segment.is_label:
            chat.refuse(i, "the assistant's text is printed inside another message", segment.start)
    if not own:
        return []  # the template drops this message
    start, spans = turn_start(chat, i, own[0]), []
    for segment in chat.segments[own[0] : own[-1] + 1]:
        if segment.printer == i:
            if segment.source not in (tracing.LITERAL, i):
                chat.refuse(i, "the turn has a text that is not the assistant's", segment.start)
            if spans and spans[-1][1] == segment.start:
                spans[-1][1] = segment.end
            elif segment.end > start:
                spans.append([max(start, segment.start), segment.end])
        elif segment.printer == tracing.NONE or chat.messages[segment.printer].get("role") not in ("tool", "function"):
            chat.refuse(i, "the turn contains text that is not part of it", segment.start)
    if spans:
        spans[-1][1] = turn_end(chat, i, own, spans[-1][0])
    return [(i, start, end) for start, end in spans if start < end]


def turn_start(chat, i: int, first: int) -> int:
    """Where the generation prompt ends in the turn of message i, whose first segment has the index `first`.

    It is looked for in the header: what the message prints before its content. The first rule that holds decides."""
    own = list(itertools.takewhile(lambda segment: segment.printer == i, chat.segments[first:]))
    start, end = own[0].start, own[-1].end
    content = next((segment.start for segment in own if segment.source == i and not segment.is_label), end)
    text, header = chat.text[start:end], chat.text[start:content]
    # 1. The header begins with the prompt that follows a question: with ChatML it is "<|im_start|>assistant\n".
    default = chat.default_prompts
    if prompt := next(filter(header.startswith, default or []), ""):
        return start + len(prompt)
    full_prompt, here = chat.prompts_before(i)
    # 2. The message begins with the prompt that follows what stands before it: the content may begin as a prompt ends,
    #    with "<think>\n". White space before the prompt may have been printed earlier, or be fed only. Or the prompt
    #    stands further on, behind BOS: "<|begin_of_text|><|start_header_id|>assistant<|end_header_id|>\n\n".
    for prompt in map(str.lstrip, [*(here or []), *(default or [])]):
        if re.search(r"\w", prompt) and (header.count(prompt) == 1 or text.lstrip().startswith(prompt)):
            return start + text.index(prompt) + len(prompt)
    # 3. All that inference feeds for an answer to the messages before ends here, or in the message. The SQuAD template
    #    prints "Answer:" with the question already, and adds nothing on request.
    if full_prompt and chat.text.startswith(full_prompt) and start <= len(full_prompt) <= end:
        return len(full_prompt)
    if default is None and here is None:
        chat.refuse(i, "the template writes no generation prompt for this conversation or for a question", start)
    # 4. The template has no prompt, so that the model has to write the header too: "ASSISTANT: Hi</s>".
    if here == [] or not (here or default):
        return start
    # 5. The header begins with a part of the prompt. With Qwen3.5 the prompt is "<|im_start|>assistant\n<think>\n", but
    #    the turns before the last question have no "<think>\n".
    for prompt in here or default:
        length = partial_prompt_len(prompt, header, chat.messages[i - 1].get("role") if i else None)
        if length is not None:
            return start + length
    chat.refuse(i, f"the header cannot be separated from what follows (the generation prompt is {prompt!r})", start)


def partial_prompt_len(prompt: str, header: str, role_before: str | None) -> int | None:
    """How many characters of the header are a part of the prompt; None: it cannot be known.

    The rest of the prompt has to be markup, such as "<think>", or to begin on a line of its own, so that the header is
    that of the same role; or the part has to name a role and end with markup, as in "<|start|>assistant<|channel|>". A
    message that continues a turn (after a tool's answer) may have no words for a header."""
    pieces = re.findall(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\w+|\s|.", prompt.lstrip())
    kept = header[: len(header) - len(header.lstrip())]
    while pieces and header.startswith(kept + pieces[0]):
        kept += pieces.pop(0)
    rest = "".join(pieces).strip()
    has_words = re.search(r"\w", re.sub(r"<[^<>]*>", "", kept if kept.strip() else header))
    if not kept.strip():
        return 0 if role_before in ("assistant", "tool", "function") and not has_words else None
    names_role = has_words or "assistant" in kept
    return len(kept) if not rest or rest[0] in "<[" or kept[-1] == "\n" or (names_role and kept[-1] in ">]") else None


def turn_end(chat, i: int, own: list[int], start: int) -> int:
    """Where the last span of message i ends, which begins at `start`; `own` are the indices of its segments."""
    segments, last = chat.segments, own[-1]
    end = segments[last].end
    value_end = next((segments[k].end for k in reversed(own) if segments[k].source != tracing.LITERAL), start)
    closing = chat.text[max(start, value_end) : end]
    # 1. The message prints an end-of-turn text after its values. White space behind that only separates turns: of
    #    "<|im_end|>\n" the line break is not trained. After a call it may be only the end of the call, "]".
    behind = end
    if closing.strip():
        end -= len(closing) - len(closing.rstrip())
        if not chat.messages[i].get("tool_calls"):
            return end
        answer = tracing.traced({"role": "assistant", "content": "x.x"}, tracing.Tag(i))
        text = tracing.joined(chat.try_chunks([*chat.traced[:i], answer]) or [])
        if not text[: len(text) - len(tracing.untagged_suffix(text))].rstrip().endswith("x.x"):
            return end  # A plain answer in its place prints a text behind its content, too, or is refused.
    stop = next((segment.start for segment in segments[last + 1 :] if segment.source != tracing.LITERAL), None)
    after = chat.text[behind:stop]
    # 2. The text behind the turn is EOS, printed together with the next message: "Hi", then "</s>USER: ...".
    eos = chat.variables.get("eos_token")
    if eos and after.lstrip().startswith(eos):
        return behind + after.index(eos) + len(eos)
    # 3. The text behind it closes every conversation: "Hi", then "<|endofchat|>" after the loop over the messages. It
    #    is no generation prompt, which some templates print in every case.
    if after.strip():
        suffix = tracing.untagged_suffix(tracing.joined(chat.chunks(chat.traced[: i + 1])))
        is_prompt = any(suffix.endswith(prompt) for prompt in chat.default_prompts or [])
        if suffix.strip() and after.startswith(suffix) and not is_prompt:
            return behind + len(suffix.rstrip())
    # 4. Nothing ends the turn ("Hi", then "USER: ..."), and `encode` adds EOS.
    return end


def tagged_spans(chat) -> list[tuple[int, int, int]]:
    """The spans of the template's own {% generation %} blocks, which may hold only what assistant messages print."""
    spans = []
    for segment in chat.segments:
        if not segment.block:
            continue
        i = segment.printer
        if i == tracing.NONE and chat.assistants:  # an end of the turn that is printed behind the loop
            i = chat.assistants[-1]
        if i not in chat.assistants:
            chat.refuse(None, "a {% generation %} block holds text that is not an assistant's", segment.start)
        if segment.source not in (tracing.LITERAL, i):
            chat.refuse(i, "a {% generation %} block holds a text of another message", segment.start)
        if spans and spans[-1][0] == i and spans[-1][2] == segment.start and spans[-1][3] == segment.block:
            spans[-1][2] = segment.end
        else:
            spans.append([i, segment.start, segment.end, segment.block])
    for span in spans:
        # Some templates begin the block before the header, which inference feeds.
        prompts = [p for p in chat.default_prompts or [] if chat.text.startswith(p, span[1], span[2] - 1)]
        span[1] += len(prompts[0]) if prompts else 0
    return [tuple(span[:3]) for span in spans]
