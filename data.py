"""Problems: where they come from, and what the model is asked.

A problem is a pair (prompt, answer): the whole user message, and the gold answer as text. Training
sets and benchmarks differ in the names of their fields and in the place of the gold answer:

    MATH-500, AIME, AMC, Omni-MATH, Minerva   in a field of its own
    GSM8K                                     after "#### " at the end of a worked solution
    MATH                                      in the last \\boxed{} of a worked solution
    OlympiadBench                             in a list; a `context` may precede the question
    DAPO-Math-17k                             beside a chat that asks for "Answer: ..."; rows are repeated

Every prompt ends with the same instruction, to put the answer into \\boxed{}, because that is where
reward.py looks for it. The instruction is that of Qwen2.5-Math (arXiv 2409.12122). Only the embedded
task of arithmetic.py has none. The chat template is the tokenizer's own.

A new set from the hub is a new line in KNOWN. No code that comes with a data set is run.

    python data.py [NAME_OR_FILE ...]     shows what the model is asked, and the gold answer
"""

import ast
import glob
import re
import sys
import tempfile
import unicodedata
from pathlib import Path

import arithmetic
from reward import extract_answer

# name: hub id and config, split to train on, split to evaluate on, column of the problem, column of the gold
KNOWN = {
    "dapo_math_17k":
        ("BytedTsinghua-SIA/DAPO-Math-17k", "train", None, "prompt", "reward_model.ground_truth"),
    "dapo_math_17k_processed": ("open-r1/DAPO-Math-17k-Processed:en", "train", None, "prompt", "solution"),
    "gsm8k": ("openai/gsm8k:main", "train", "test", "question", "answer"),
    "math": ("DigitalLearningGmbH/MATH-lighteval", "train", "test", "problem", "solution"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    "aime25": ("math-ai/aime25", None, "test", "problem", "answer"),
    "amc23": ("math-ai/amc23", None, "test", "question", "answer"),
    "omni_math": ("KbsdJames/Omni-MATH", None, "test", "problem", "answer"),
    "olympiadbench": ("Hothan/OlympiadBench:OE_TO_maths_en_COMP", None, "train", "question", "final_answer"),
    "minerva": ("math-ai/minervamath", None, "test", "question", "answer"),
}  # fmt: skip
EMBEDDED = {"arithmetic": ("train", 20_000), "arithmetic_heldout": ("heldout", 512)}  # name: split, problems
FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # ending: reader

# Columns that are looked for in other sets, in this order; `solution` is last, for it may be a long text.
PROBLEM_FIELDS = ["prompt", "question", "problem"]
GOLD_FIELDS = ["reward_model.ground_truth", "answer", "final_answer", "solution"]
NO_ANSWER = {"proof", "notfound", "not found", "n/a", "nan"}  # what sets write where there is no gold

INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
ASKS_FOR_BOX = re.compile(r"\\boxed[^.?!\n]*[.?!$\s]*\Z")  # in the last sentence; others are quoted
DAPO_BEFORE = re.compile(r"^Solve the following math problem step by step\. .* form Answer: \$Answer .*\n\n")
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'
BOX_WITHOUT_BRACES = re.compile(r"\\(?:boxed|fbox)\s*([^\s{$][^\s$]*?)(?=[.,]?(?:[\s$]|\Z))")  # \boxed 2
LIST_AS_TEXT = re.compile(r"\s*\[\s*['\"].*['\"]\s*\]\s*", re.DOTALL)  # ['588']; [2, 5] is an interval
NO_COMMA = re.compile(r"(['\"])\s+(['\"])")  # as NumPy writes a list: ['2' '3']


class UserError(ValueError):
    """Something that a user can correct: a file, an option, a checkpoint. Its text is one line to show."""


def load_problems(name_or_path, prompt_field=None, answer_field=None, limit=None, benchmark=False):
    """The problems of a known name, a local file or a hub id, as a list of (prompt, answer).

    A hub id may carry its config and split: "owner/name:config:split", each may be empty. `benchmark` asks
    for the evaluation split where a set has both. Training sets lose repeated problems; benchmarks keep them,
    so that their size is the published one. `limit` takes the first problems. The two fields choose the
    columns of a file or hub id; known names have their own. Rows whose gold says that there is none, and bad
    rows of the hub, are left out and counted on standard error. Raises UserError if the source cannot be
    read, if a row of a local file is wrong, or if no problem is left.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name in EMBEDDED:
        split, count = EMBEDDED[name]
        return arithmetic.problems(split, count if limit is None else min(limit, count))
    is_file = name not in KNOWN and (path.exists() or path.suffix.lower() in FILES)
    if name in KNOWN:
        prompt_field, answer_field = KNOWN[name][3:]
    problems, seen, left_out, long_chats = [], set(), [], 0
    for number, row in enumerate(file_rows(path) if is_file else hub_rows(name, benchmark), 1):
        if limit is not None and len(problems) >= limit:
            break
        row = flatten(row)
        if number == 1:
            question = choose_column(row, prompt_field, PROBLEM_FIELDS, "--prompt-field", name)
            gold = choose_column(row, answer_field, GOLD_FIELDS, "--answer-field", name)
        try:
            problem, answer = problem_text(row, question), gold_answer(row.get(gold), gold)
        except UserError as error:
            if is_file:
                raise UserError(f"{name}: row {number}: {error}") from None
            answer = None  # the user cannot correct a row of the hub
        if answer is None or answer.lower() in NO_ANSWER:
            left_out.append(number)
        elif benchmark or problem not in seen:
            problems.append((instruct(problem), answer))
            seen.add(problem)
            long_chats += isinstance(row[question], list) and len(row[question]) > 1
    if left_out:
        print(f"{name}: {len(left_out)} rows without a gold left out, first {left_out[0]}", file=sys.stderr)
    if long_chats:
        print(f"{name}: only the last user message is asked of {long_chats} longer chats", file=sys.stderr)
    if not problems:
        raise UserError(f"{name}: holds no problems")
    return problems


# 1. From a row to a problem.


def flatten(row):
    """The row with the fields of inner objects beside the others: {"a": {"b": 1}} also has "a.b"."""
    inner = {key: value for key, value in row.items() if isinstance(value, dict)}
    return row | {f"{key}.{name}": value for key, fields in inner.items() for name, value in fields.items()}


def choose_column(row, asked, known, option, source):
    """The column that is asked for, or else the first known one, in upper or lower case."""
    if asked in row:
        return asked
    columns = {column.lower(): column for column in reversed(row)}
    found = [columns[name] for name in known if name in columns and asked is None]
    if not found:
        wanted = asked or " or ".join(known)
        raise UserError(f"{source}: no column {wanted} among {', '.join(row)}; choose one with {option}")
    return found[0]


def problem_text(row, field):
    """The problem itself: a text, or the last user message of a chat; without DAPO's request for a form."""
    text = row.get(field)
    if isinstance(text, list):
        messages = [m.get("content") for m in text if isinstance(m, dict) and m.get("role") == "user"]
        text = messages[-1] if messages else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"the problem in {field!r} is empty or no text: {text!r:.40}")
    text = DAPO_BEFORE.sub("", text.strip()).removesuffix(DAPO_AFTER).strip()
    context = row.get("context")
    return f"{context.strip()}\n\n{text}" if isinstance(context, str) and context.strip() else text


def instruct(problem):
    """The user message: the problem and the instruction, unless the problem ends with a request for a box."""
    return problem if ASKS_FOR_BOX.search(problem) else problem + INSTRUCTION


def gold_answer(value, field):
    """The gold as text: "025" stays "025", 142.0 becomes "142", ["2"] and "['2']" become "2"."""
    if isinstance(value, str) and LIST_AS_TEXT.fullmatch(value):
        try:
            value = ast.literal_eval(NO_COMMA.sub(r"\1, \2", value.strip()))
        except (ValueError, SyntaxError):
            pass  # no list
    if isinstance(value, list) and value:
        return ", ".join(gold_answer(v, field) for v in value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:  # a larger one has lost digits
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        value = ""
    text = str(value).strip()
    if "####" in text:  # GSM8K
        text = text.rpartition("####")[2].replace(",", "").strip()
    if "\\boxed" in text or "\\fbox" in text:
        text = extract_answer(BOX_WITHOUT_BRACES.sub(r"\\boxed{\1}", text))
    elif field.lower() == "solution" and ("\n" in text or len(text) > 100):
        text = None  # a worked solution; a short one is the gold itself, as in the processed DAPO
    if not text:
        raise UserError(f"no gold in {field!r}: it must be a text, a number or a closed \\boxed{{}}")
    return text


# 2. From a name to rows.


def file_rows(path):
    """Rows of a local file as dicts, read as a stream, so that there is no cache to be out of date."""
    if path.is_dir() or path.suffix.lower() not in FILES:
        raise UserError(f"{path}: not a data file: its name must end in {', '.join(FILES)}")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    datasets, kind = quiet_datasets(), FILES[path.suffix.lower()]
    with tempfile.TemporaryDirectory() as folder:  # `datasets` leaves lock files behind
        options = {"data_files": glob.escape(str(path.absolute())), "cache_dir": folder, "streaming": True}
        try:
            if kind == "csv":  # all columns are text: "025" is no number, and "True" no truth value
                options["na_filter"] = False
                header = next(datasets.load_dataset(kind, split="train", nrows=1, **options).iter(1))
                if "__index_level_0__" in header:
                    raise ValueError("a row has more fields than the header")
                options["features"] = datasets.Features({name: datasets.Value("string") for name in header})
            yield from rows_of(datasets.load_dataset(kind, split="train", **options))
        except StopIteration:
            return  # an empty file
        except Exception as error:  # the readers raise many kinds, some of them after the first rows
            raise UserError(f"{path}: cannot be read: {one_line(error)}") from None


def hub_rows(name, benchmark):
    """Rows of a known name or a hub id as dicts, from the cache of this machine where there is no network."""
    hub_id, train, test = KNOWN[name][:3] if name in KNOWN else (name, "train", "test")
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?::([^:]*))?(?::([^:]*))?", hub_id)
    if not match:
        known = ", ".join([*EMBEDDED, *KNOWN])
        raise UserError(f"{name}: no file, no hub id (owner/name), and no known set; known are {known}")
    hub_id, config, split = (part or None for part in match.groups())
    if benchmark:
        split = split or test or train
    else:
        split = split or train or test
    datasets = quiet_datasets()
    from huggingface_hub import HfApi, errors

    try:
        HfApi().dataset_info(hub_id, timeout=5)  # asked once; load_dataset would try for 24 seconds
    except errors.HfHubHTTPError:
        pass  # the hub can be reached; load_dataset reports what is wrong
    except Exception:
        datasets.config.HF_HUB_OFFLINE = True  # from here on only the cache is read
    try:
        table = datasets.load_dataset(hub_id, config, split=split)
    except ConnectionError:
        how = f"run `hf download {hub_id} --repo-type dataset --local-dir FOLDER` where there is a network"
        raise UserError(f"{hub_id}: not in the cache, no network: {how}, and name a file of FOLDER") from None
    except Exception as error:  # the name, config or split is wrong
        raise UserError(f"{hub_id} (config {config}, split {split}): {one_line(error)}") from None
    yield from rows_of(table)


def rows_of(table):
    """Rows as dicts, read a thousand at a time: several times faster than one by one."""
    for batch in table.iter(1000):
        for values in zip(*batch.values()):
            yield dict(zip(batch, values))


def quiet_datasets():
    """`datasets` without progress bars and warnings. Imported only where needed: that takes two seconds."""
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    return datasets


def one_line(error):
    """The first line of an error's text, at most 200 characters of it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def out_of_memory(error):
    """Whether an error says that memory ran out: Python's, or PyTorch's on a CPU or a GPU."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text


# 3. What training and evaluation do with problems.


def encode_problems(tokenizer, problems, max_tokens, source):
    """[(prompt ids in the tokenizer's chat template, or None if more than `max_tokens`; answer), ...].

    Raises UserError, which names `source`, if the template fails or if every prompt is too long.
    """
    chats = [[{"role": "user", "content": prompt}] for prompt, _ in problems]
    try:
        encoded = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # a template is a program of the checkpoint's; it may fail in any way
        what = f"{tokenizer.name_or_path}: no chat template that accepts a user message: {one_line(error)}"
        raise UserError(f"{source}: {what}") from error
    shortest = min(map(len, encoded))
    if shortest > max_tokens:
        what = f"all prompts are longer than {max_tokens} tokens: the shortest has {shortest}"
        raise UserError(f"{source}: {what}")
    return [(ids if len(ids) <= max_tokens else None, answer) for ids, (_, answer) in zip(encoded, problems)]


def drop_overlap(train, held_out):
    """(training problems that occur in no held-out set, how many others were dropped)."""
    known = {normalise(prompt) for prompt, _ in held_out}
    kept = [problem for problem in train if normalise(problem[0]) not in known]
    return kept, len(train) - len(kept)


def normalise(prompt):
    """The problem without what its copies differ in: instruction, case, spacing, dollar signs, and so on."""
    text = unicodedata.normalize("NFKC", prompt.removesuffix(INSTRUCTION)).lower()
    text = re.sub(r"\\(left|right|displaystyle|quad|[,;:! ])", "", text)
    return re.sub(r"[^\w+*/<>-]", "", text)


def main(names):
    """Prints the first problem of each source."""
    for name in names or EMBEDDED:
        problems = load_problems(name)
        prompt, answer = problems[0]
        print(f"{name}: {len(problems):,} problems, the first\n   asked  {prompt!r}\n   gold   {answer}")
    print("known on the hub:", ", ".join(KNOWN))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        sys.exit(2)
