"""Problems: where they come from, and what the model is asked.

A problem is a pair (prompt, answer): the whole user message, and the gold answer as text. Training
sets and benchmarks differ only in the names of their fields and in where the gold hides:

    MATH-500, AIME, AMC, Omni-MATH, Minerva   in a field of its own
    GSM8K                                     after "#### " at the end of a worked solution, with thousands commas
    MATH                                      in the last \\boxed{} of a worked solution
    OlympiadBench                             in a list; a `context` may precede the question
    DAPO-Math-17k                             beside a chat that asks for "Answer: ..." and is repeated a hundred times

Every prompt ends with the same instruction, to put the answer into \\boxed{}, because that is where
reward.py looks for it; a set's own request for another form ("Answer:") is taken off first. Only the
embedded task of arithmetic.py needs no instruction. The chat template is the tokenizer's own.

A new set from the hub is a new line in KNOWN; local files with its fields then load as well. Nothing
here runs code that came with a data set. Sources: the sets' cards on the hub; the instruction is that
of Qwen2.5-Math (arXiv 2409.12122).

    python data.py [NAME_OR_FILE ...]     shows what the model is asked, and the gold
"""

import csv
import json
import pathlib
import re
import sys
import threading
import unicodedata
import urllib.error
import urllib.request

import arithmetic

KNOWN = {
    # name: (hub id, config, split to train on, split to evaluate on, field of the problem, field of the gold)
    "dapo_math_17k": ("BytedTsinghua-SIA/DAPO-Math-17k", "default", "train", None, "prompt", "reward_model.ground_truth"),
    "dapo_math_17k_processed": ("open-r1/DAPO-Math-17k-Processed", "en", "train", None, "prompt", "solution"),
    "gsm8k": ("openai/gsm8k", "main", "train", "test", "question", "answer"),
    "math": ("DigitalLearningGmbH/MATH-lighteval", "default", "train", "test", "problem", "solution"),
    "math500": ("HuggingFaceH4/MATH-500", None, None, "test", "problem", "answer"),
    "aime24": ("HuggingFaceH4/aime_2024", None, None, "train", "problem", "answer"),
    "aime25": ("math-ai/aime25", None, None, "test", "problem", "answer"),
    "amc23": ("math-ai/amc23", None, None, "test", "question", "answer"),
    "omni_math": ("KbsdJames/Omni-MATH", None, None, "test", "problem", "answer"),
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", None, "train", "question", "final_answer"),
    "minerva": ("math-ai/minervamath", None, None, "test", "question", "answer"),
}
EMBEDDED = {"arithmetic": ("train", 20_000), "arithmetic_heldout": ("heldout", 512)}  # name: (split, problems)

# What a local file is searched for, in this order, whatever the case; `solution` last, for the gold may also stand alone.
PROBLEM_FIELDS = list(dict.fromkeys(row[4] for row in KNOWN.values()))
GOLD_FIELDS = sorted(dict.fromkeys(row[5] for row in KNOWN.values()), key=lambda field: field == "solution")

INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
DAPO_BEFORE = re.compile(r"^Solve the following math problem step by step\. [^\n]* form Answer: \$Answer [^\n]*\n\n")
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


class UserError(ValueError):
    """Something that a user can mend: a file, an option, a checkpoint. Its text is the one line to show."""


class RowError(ValueError):
    """A row without a problem or without a gold."""


def load_problems(name_or_path, split=None, config=None, prompt_field=None, answer_field=None, limit=None, benchmark=False):
    """The problems of a known name, a local file or a hub id, as a list of (prompt, answer).

    A hub id may carry its config and split: "owner/name:config:split", each may be empty. `benchmark` asks for
    the evaluation split where a set has both. Training sets made of chats (field `prompt`) lose their repeated
    problems; benchmarks keep theirs, so that their size is the published one. `limit` takes the first ones.
    """
    if (name := str(name_or_path)) in EMBEDDED:
        part, count = EMBEDDED[name]
        return arithmetic.problems(part, count if limit is None else min(limit, count))
    rows, source, fields = open_source(name, split, config, benchmark)
    fields, chosen = (prompt_field or fields[0], answer_field or fields[1]), None
    problems, seen, bad = [], set(), []
    for number, row in rows:
        if limit is not None and len(problems) >= limit:
            break
        try:
            flat = flatten(row)
            chosen = chosen or choose_fields(flat, *fields, source)
            problem, answer = problem_text(flat, chosen[0]), gold_answer(flat.get(chosen[1]), chosen[1])
        except RowError as error:
            if isinstance(source, pathlib.Path):  # the user's own file: to be mended
                raise UserError(f"{source}:{number}: {error}") from None
            bad.append(f"row {number}: {error}")  # the hub's: nobody here can mend it
            continue
        if chosen[0] != "prompt" or problem not in seen:
            problems.append((instruct(problem), answer))
        seen.add(problem)
    if bad:
        print(f"{source}: {len(bad)} rows left out, the first: {bad[0]}", file=sys.stderr)
    if not problems:
        raise UserError(f"{source}: holds no problems")
    return problems


# 1. From a row to a problem.


def flatten(row):
    """The row with the fields of inner objects beside the others: {"a": {"b": 1}} also has "a.b"."""
    if not isinstance(row, dict):
        raise RowError(f"a row must be an object with named fields, this is a {type(row).__name__}")
    return row | {f"{key}.{k}": v for key, value in row.items() if isinstance(value, dict) for k, v in value.items()}


def choose_fields(flat, prompt_field, answer_field, source):
    """The names of the problem's and the gold's field in this row: those asked for, or else the first known ones."""
    columns = {name.lower(): name for name in reversed(flat)}
    chosen = []
    for asked, known, option in (prompt_field, PROBLEM_FIELDS, "--prompt-field"), (answer_field, GOLD_FIELDS, "--answer-field"):
        chosen.append(asked if asked in flat else next((columns[k] for k in known if k in columns and not asked), None))
        if chosen[-1] is None:
            wanted = repr(asked) if asked else f"named {' or '.join(known)}"
            raise UserError(f"{source}: no column {wanted} among {', '.join(flat)}; choose with {option}")
    return chosen


def problem_text(flat, field):
    """The problem itself: a plain text, or the last user message of a chat; without DAPO's template."""
    text = flat.get(field)
    if isinstance(text, list):
        text = next((m.get("content") for m in reversed(text) if isinstance(m, dict) and m.get("role") == "user"), None)
    if not isinstance(text, str) or not text.strip():
        raise RowError(f"the problem in {field!r} is no text or empty: {text!r:.40}")
    text = DAPO_BEFORE.sub("", text.strip()).removesuffix(DAPO_AFTER).strip()
    context = flat.get("context")
    return f"{context.strip()}\n\n{text}" if isinstance(context, str) and context.strip() else text


def instruct(problem):
    """The user message: the problem and the instruction, unless it asks for a box already."""
    return problem if "\\boxed" in problem else problem + INSTRUCTION


def gold_answer(value, field):
    """The gold as text. "025" stays "025"; 142.0 becomes "142"; ["2"] becomes "2"."""
    if isinstance(value, list) and value:
        return ", ".join(gold_answer(v, field) for v in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip() if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""
    if "####" in text:  # GSM8K
        text = text.rsplit("####", 1)[1].replace(",", "").strip()
    worked = field.lower() == "solution"
    if "\\boxed" in text or "\\fbox" in text:
        box = last_box(text)
        if worked or box and text.count("\\boxed") == 1:
            text = (box or "").strip()
    elif worked and ("\n" in text or len(text) > 100):  # a short one is the gold itself, as in the processed DAPO
        raise RowError(f"no \\boxed in the worked solution in {field!r}")
    if text in ("", "nan", "inf", "-inf"):
        raise RowError(f"the gold in {field!r} is empty, or neither text nor number: {value!r:.40}")
    return text


def last_box(text):
    """What stands in a solution's last \\boxed or \\fbox, or None. More lenient than reward.py's rule for the
    answer of a model: solutions of MATH also write `\\boxed 2`."""
    rest = re.split(r"\\(?:boxed|fbox)\s*", text)[-1]
    if not rest.startswith("{"):
        return re.split(r"[$\s]", rest)[0].rstrip(".,") or None
    depth = 0
    for match in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)  # an escaped brace is part of the answer
        if depth == 0:
            return rest[1 : match.start()]
    return None


# 2. From a name to rows.


def open_source(name, split, config, benchmark):
    """(rows with their numbers, what to call the source, field names if known) of a name, file or hub id."""
    path = pathlib.Path(name)
    if name in KNOWN:
        hub_id, known_config, train, test, *fields = KNOWN[name]
        split = split or (test or train if benchmark else train or test)
        return hub_rows(hub_id, config or known_config, split), f"{name} ({hub_id})", fields
    if path.suffix.lower() in READERS or path.exists():
        return file_rows(path), path, (None, None)
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?::([^:]*))?(?::([^:]*))?", name)
    if not match:
        raise UserError(f"{name}: no file, no hub id (owner/name) and no known set; known are {', '.join([*EMBEDDED, *KNOWN])}")
    hub_id, inline_config, inline_split = match.groups()
    rows = hub_rows(hub_id, config or inline_config or None, split or inline_split or ("test" if benchmark else "train"))
    return rows, name, (None, None)


def file_rows(path):
    """Rows of a local file with their line (JSON and Parquet: row) numbers; what cannot be read is a UserError."""
    if path.is_dir():
        raise UserError(f"{path}: a folder; name a {', '.join(READERS)} file in it")
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path}: the name of a data file must end in {', '.join(READERS)}")
    try:
        yield from READERS[path.suffix.lower()](path)
    except UserError:
        raise
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from None


def read_jsonl(path):
    """One object a line; empty lines are skipped."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                row = json.loads(line) if line else None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not JSON in UTF-8: {one_line(error)}") from None
            if line:
                yield number, row


def read_json(path):
    """A list of objects, or one object a line, as `datasets` writes its .json files."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return enumerate(json.loads(text), 1)
    return read_jsonl(path)


def read_csv(path):
    """A header and rows; the number is that of a row's last line."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="(surplus)", strict=True)
        for row in reader:
            yield reader.line_num, row


def read_parquet(path):
    """Needs pyarrow, which comes with `datasets`."""
    import pyarrow.parquet

    return numbered(pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000))


def numbered(batches):
    """Rows of Arrow batches, never all of them at once: the full DAPO file has 1.8 million."""
    return enumerate((row for batch in batches for row in batch.to_pylist()), 1)


READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


def hub_rows(hub_id, config, split):
    """Rows of a data set on the Hugging Face hub, from the cache where there is no network."""
    import datasets  # a second of import that local files need not pay

    reachable = hub_reachable()
    datasets.config.HF_HUB_OFFLINE = not reachable
    try:
        table = datasets.load_dataset(hub_id, config, split=split).with_format("arrow")
    except Exception as error:  # whatever `datasets` raises, it is about this name, config, split or the network
        if reachable:
            raise UserError(f"{hub_id} (config {config}, split {split}): {one_line(error)}") from None
        how = f"run `hf download {hub_id} --repo-type dataset --local-dir FOLDER` where there is one, and give a {', '.join(READERS)} file of it"
        raise UserError(f"{hub_id}: not cached here, and no network to the hub: {how} instead of the name") from None
    yield from numbered(table.iter(1000))


def hub_reachable(seconds=5):
    """Whether the hub answers, known after `seconds` at most. If not, the hub's library is told to use its cache
    only: its own five retries take 23 s. In a thread, because a dead name server heeds no timeout."""
    from huggingface_hub import constants

    answered = []

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=seconds)
            answered.append(True)
        except Exception as error:
            answered.append(isinstance(error, urllib.error.HTTPError))  # an error page is an answer

    if not constants.HF_HUB_OFFLINE:
        (thread := threading.Thread(target=ask, daemon=True)).start()
        thread.join(seconds)
        constants.HF_HUB_OFFLINE = answered != [True]
    return not constants.HF_HUB_OFFLINE


def one_line(error):
    """The first line of an error's text, of bearable length."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# 3. What training and evaluation do with problems.


def encode_prompts(tokenizer, prompts, max_tokens, refuse=True):
    """Token ids of each prompt in the tokenizer's chat template; None where they are more than `max_tokens`: an error if all are, and `refuse`."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    try:
        encoded = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False) if chats else []
    except Exception as error:  # a template is a program of the checkpoint's, run in a sandbox; it may fail in any way
        raise UserError(f"{tokenizer.name_or_path}: no chat template that puts a prompt to this model: {one_line(error)}") from None
    if refuse and prompts and all(len(ids) > max_tokens for ids in encoded):
        first = f"{min(map(len, encoded))}; the first prompt begins {prompts[0]:.40}".splitlines()[0]
        raise UserError(f"all {len(prompts)} prompts are longer than {max_tokens} tokens: the shortest has {first}")
    return [ids if len(ids) <= max_tokens else None for ids in encoded]


def normalise(prompt):
    """The problem without what copies of it differ in: instruction, case, spacing, dollars and other punctuation."""
    text = unicodedata.normalize("NFKC", prompt.removesuffix(INSTRUCTION)).lower()
    text = re.sub(r"\\(left|right|displaystyle|quad|[,;:! ])", "", text)
    return re.sub(r"[^\w+*/<>-]", "", text)


def drop_overlap(train, evaluation):
    """(training problems that occur in no evaluation set, how many others were dropped)."""
    known = {normalise(prompt) for prompt, _ in evaluation}
    kept = [problem for problem in train if normalise(problem[0]) not in known]
    return kept, len(train) - len(kept)


EXAMPLES = (
    {"question": "A toy costs $25. What do 85 cost?", "answer": "25 * 85 = 2,125\n#### 2,125"},  # GSM8K
    {"problem": "What is half of $x$?", "solution": "Divide by 2: $\\boxed{\\frac{x}{2}}$."},  # MATH
    {"context": "Let $n>1$.", "question": "Find $n$.", "final_answer": ["$n=2$"]},  # OlympiadBench
    {"prompt": [{"role": "user", "content": "2+2?" + DAPO_AFTER}], "reward_model": {"ground_truth": "4"}},  # DAPO
)


def main(names):
    for row in EXAMPLES if not names else ():
        flat = flatten(row)
        problem, gold = choose_fields(flat, None, None, "example")
        print(f"== {row}\n{instruct(problem_text(flat, problem))}\n-> {gold_answer(flat[gold], gold)}\n")
    for name in names or EMBEDDED:
        problems = load_problems(name)
        print(f"== {name}: {len(problems)} problems, the first\n{problems[0][0]}\n-> {problems[0][1]}\n")
    print("known on the hub:", ", ".join(f"{name} ({row[0]})" for name, row in KNOWN.items()))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(print(error, file=sys.stderr) or 2)
