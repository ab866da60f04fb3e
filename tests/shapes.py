"""The shapes that public data sets have: their columns with made-up rows. `tests/shapes.md` says how each is read."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """Rows of one shape.

    Attributes:
        stage: What trains on them: `sft`, `dpo`, `classification` or `grpo`.
        row: A row with the data set's own columns.
        more: Settings of `data.*` that the shape needs.
    """

    stage: str
    row: dict[str, Any]
    more: dict[str, Any] = {}  # noqa: RUF012 - never changed


def said(*texts: str, role: str = "role", content: str = "content", names: tuple[str, str] = ("user", "assistant")):
    """Turns of a user and an assistant, one after the other."""
    return [{role: names[number % 2], content: text} for number, text in enumerate(texts)]


def told(*texts: str, names: tuple[str, str] = ("human", "gpt")):
    """The same as ShareGPT has them."""
    return said(*texts, role="from", content="value", names=names)


def in_parts(*texts: str):
    """Turns whose content is parts, each with its weight."""
    return [
        {**turn, "content": [{"type": "text", "value": turn["content"]}], "loss_weight": float(number % 2)}
        for number, turn in enumerate(said(*texts))
    ]


ASK, SAY, BAD = "2+2?", "4.", "5."
ADD = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
TOOL = {"type": "function", "function": ADD}
CALL = {"name": "add", "arguments": {"a": 2}}
SHORT_ADD = {"name": "add", "description": "Adds.", "parameters": {"a": {"description": "One.", "type": "int"}}}
SYSTEM = {"from": "system", "value": "Be brief."}

SHAPES: dict[str, Shape] = {
    # ---- one question, one answer -------------------------------------------------------------------------------
    "Alpaca": Shape(
        "sft", {"instruction": "Add.", "input": "2, 2", "output": SAY, "text": "Below is ... Add. 2, 2 4."}
    ),
    "Alpaca of LLaMA-Factory": Shape(
        "sft", {"instruction": ASK, "input": "", "output": SAY, "system": "Be brief.", "history": [["Hi", "Hello."]]}
    ),
    "Dolly 15k": Shape(
        "sft", {"instruction": "Who sang?", "context": "Ann sang.", "response": "Ann.", "category": "closed_qa"}
    ),
    "OpenOrca": Shape("sft", {"id": "cot.1", "system_prompt": "Be brief.", "question": ASK, "response": SAY}),
    "WizardLM evol-instruct 70k, Evol-Instruct-Code": Shape("sft", {"instruction": ASK, "output": SAY}),
    "CodeAlpaca 20k": Shape("sft", {"instruction": "Print 4.", "input": "", "output": "print(4)"}),
    "Magicoder-OSS-Instruct": Shape(
        "sft",
        {
            "lang": "python",
            "raw_index": 1,
            "index": 2,
            "seed": "x = 4",
            "openai_fingerprint": "fp",
            "problem": "Print 4.",
            "solution": "print(4)",
        },
    ),
    "Magicoder-Evol-Instruct, GPTeacher": Shape("sft", {"instruction": "Print 4.", "response": "print(4)"}),
    "BELLE": Shape("sft", {"instruction": "二加二?", "input": "", "output": "四。"}),
    "Firefly": Shape("sft", {"kind": "MathQA", "input": "二加二?", "target": "四。"}),
    "COIG-CQIA": Shape(
        "sft",
        {
            "instruction": "二加二?",
            "input": "",
            "output": "四。",
            "task_type": {"major": ["问答"]},
            "domain": ["通用"],
            "metadata": "",
            "answer_from": "human",
            "human_verified": True,
            "copyright": "",
        },
    ),
    "GSM8K": Shape("sft", {"question": ASK, "answer": "2+2 = <<2+2=4>>4\n#### 4"}),
    "MetaMathQA": Shape(
        "sft", {"type": "GSM_Rephrased", "query": ASK, "original_question": "2 and 2?", "response": SAY}
    ),
    "MathInstruct": Shape("sft", {"source": "CoT/gsm", "instruction": ASK, "output": SAY}),
    "OpenMathInstruct-2": Shape(
        "sft", {"problem": ASK, "generated_solution": "2+2 = 4.", "expected_answer": "4", "problem_source": "augmented"}
    ),
    "NuminaMath-1.5": Shape(
        "sft",
        {
            "problem": ASK,
            "solution": "2+2 = 4.",
            "answer": "4",
            "problem_type": "Algebra",
            "question_type": "MCQ",
            "source": "amc",
            "synthetic": False,
        },
    ),
    "MATH (Hendrycks)": Shape("sft", {"problem": ASK, "level": "Level 1", "type": "Algebra", "solution": "2+2 = 4."}),
    "medical-o1-reasoning-SFT": Shape("sft", {"Question": ASK, "Complex_CoT": "Two and two.", "Response": SAY}),
    "s1K": Shape(
        "sft",
        {
            "solution": "4",
            "question": ASK,
            "cot_type": "math",
            "source_type": "x",
            "metadata": "{}",
            "cot": None,
            "thinking_trajectories": ["Two and two."],
            "attempt": SAY,
        },
        {"columns": {"instruction": "question", "output": "attempt"}},
    ),
    "FLAN, Aya, xP3": Shape("sft", {"inputs": ASK, "targets": SAY, "task_name": "sum"}),
    "P3": Shape("sft", {"inputs_pretokenized": ASK, "targets_pretokenized": SAY, "inputs": [5, 6], "targets": [7]}),
    "GPT4All, prompt and response": Shape("sft", {"prompt": ASK, "response": SAY, "source": "x"}),
    "TRL prompt and completion": Shape("sft", {"prompt": "2 + 2 =", "completion": " 4"}),
    "TRL prompt and completion, conversational": Shape("sft", {"prompt": said(ASK), "completion": said(ASK, SAY)[1:]}),
    "HumanEval": Shape(
        "sft",
        {
            "task_id": "H/1",
            "prompt": "def two():\n",
            "canonical_solution": "    return 2\n",
            "test": "assert two() == 2",
            "entry_point": "two",
        },
        {"columns": {"completion": "canonical_solution"}},
    ),
    "MBPP": Shape(
        "sft",
        {
            "task_id": 1,
            "text": "Print 4.",
            "code": "print(4)",
            "test_list": ["assert 1"],
            "test_setup_code": "",
            "challenge_test_list": [],
        },
        {"columns": {"instruction": "text", "output": "code"}},
    ),
    "sql-create-context": Shape(
        "sft", {"answer": "SELECT 4", "question": "Give 4.", "context": "CREATE TABLE t (n INT)"}
    ),
    "SAMSum": Shape("sft", {"id": "1", "dialogue": "A: Hi. B: Bye.", "summary": "They met."}),
    "CNN/DailyMail": Shape("sft", {"article": "It rained.", "highlights": "Rain.", "id": "1"}),
    "XSum, BillSum": Shape("sft", {"document": "It rained.", "summary": "Rain.", "id": "1"}),
    "SQuAD": Shape(
        "sft",
        {
            "id": "1",
            "title": "Ann",
            "context": "Ann sang.",
            "question": "Who sang?",
            "answers": {"text": ["Ann"], "answer_start": [0]},
        },
    ),
    "WMT, OPUS": Shape("sft", {"translation": {"de": "vier", "en": "four"}}),
    # ---- conversations ------------------------------------------------------------------------------------------
    "OpenAI fine-tuning": Shape(
        "sft",
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                *said(ASK, SAY),
                {"role": "user", "content": "And 3?"},
                {"role": "assistant", "content": "3.", "weight": 0},
            ]
        },
    ),
    "OpenAI fine-tuning, tool calls": Shape(
        "sft",
        {
            "messages": [
                {"role": "user", "content": ASK},
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "4"},
                {"role": "assistant", "content": SAY},
            ],
            "parallel_tool_calls": False,
            "tools": [TOOL],
        },
    ),
    "mistral-finetune": Shape(
        "sft",
        {
            "messages": [
                {"role": "user", "content": ASK},
                {"role": "assistant", "content": BAD, "weight": 0},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": SAY, "weight": 1},
            ]
        },
    ),
    "Together, messages": Shape("sft", {"messages": said(ASK, SAY)}),
    "UltraChat 200k": Shape("sft", {"prompt": ASK, "prompt_id": "p1", "messages": said(ASK, SAY)}),
    "No Robots": Shape("sft", {"prompt": ASK, "prompt_id": "p1", "messages": said(ASK, SAY), "category": "Open QA"}),
    "SmolTalk": Shape("sft", {"messages": said(ASK, SAY), "source": "smol-magpie"}),
    "SmolTalk 2": Shape(
        "sft",
        {
            "messages": said(ASK, SAY),
            "chat_template_kwargs": {"enable_thinking": False, "custom_instructions": ""},
            "source": "x",
        },
    ),
    "Tulu 3 SFT mixture": Shape("sft", {"id": "1", "messages": said(ASK, SAY), "source": "ai2"}),
    "OpenR1-Math-220k": Shape(
        "sft",
        {
            "problem": ASK,
            "solution": "4",
            "answer": "4",
            "problem_type": "Algebra",
            "source": "x",
            "uuid": "u",
            "generations": ["<think>Two.</think>4."],
            "messages": said(ASK, "<think>Two.</think>4."),
        },
    ),
    "NuminaMath-CoT": Shape("sft", {"source": "amc", "problem": ASK, "solution": SAY, "messages": said(ASK, SAY)}),
    "ShareGPT": Shape("sft", {"id": "1", "conversations": told(ASK, SAY)}),
    "OpenHermes 2.5": Shape(
        "sft",
        {
            "custom_instruction": None,
            "topic": None,
            "model_name": None,
            "model": None,
            "skip_prompt_formatting": False,
            "category": "x",
            "conversations": told(ASK, SAY),
            "views": None,
            "language": None,
            "id": None,
            "title": None,
            "idx": None,
            "hash": None,
            "avatarUrl": None,
            "system_prompt": None,
            "source": "airoboros",
        },
    ),
    "SlimOrca": Shape(
        "sft",
        {
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {"from": "human", "value": ASK, "weight": 0.0},
                {"from": "gpt", "value": SAY, "weight": 1.0},
            ]
        },
    ),
    "Infinity-Instruct": Shape(
        "sft",
        {
            "id": 1,
            "conversations": told(ASK, SAY),
            "label": {"ability_en": ["math"]},
            "langdetect": "en",
            "source": "x",
        },
    ),
    "OpenThoughts": Shape(
        "sft",
        {
            "system": "Think first.",
            "conversations": told(ASK, "<|begin_of_thought|>Two.<|end_of_thought|>4.", names=("user", "assistant")),
        },
    ),
    "Capybara": Shape(
        "sft", {"source": "x", "conversation": [{"input": ASK, "output": SAY}, {"input": "+1?", "output": "5."}]}
    ),
    "LMSYS-Chat-1M": Shape(
        "sft",
        {
            "conversation_id": "1",
            "model": "m",
            "conversation": said(ASK, SAY),
            "turn": 1,
            "language": "English",
            "openai_moderation": [{"flagged": False}],
            "redacted": False,
        },
    ),
    "WildChat": Shape(
        "sft",
        {
            "conversation_hash": "h",
            "model": "m",
            "timestamp": "2026-01-01",
            "conversation": [
                {**turn, "language": "English", "toxic": False, "turn_identifier": 1} for turn in said(ASK, SAY)
            ],
            "turn": 1,
            "language": "English",
            "toxic": False,
        },
    ),
    "LIMA": Shape("sft", {"conversations": [ASK, SAY], "source": "stackexchange"}),
    "dialogues of Guanaco": Shape("sft", {"text": "### Human: 2+2?### Assistant: 4."}),
    "OpenAssistant (oasst1)": Shape(
        "sft",
        {
            "message_id": "m2",
            "parent_id": "m1",
            "user_id": "u",
            "created_date": "2023",
            "text": SAY,
            "role": "assistant",
            "lang": "en",
            "rank": 0,
            "message_tree_id": "m1",
            "tree_state": "ready_for_export",
        },
    ),
    "MOSS 003": Shape(
        "sft",
        {
            "conversation_id": "1",
            "meta_instruction": "Be brief.",
            "num_turns": 1,
            "chat": {"turn_1": {"Human": f"<|Human|>: {ASK}<eoh>\n", "MOSS": f"<|MOSS|>: {SAY}<eom>\n"}},
        },
    ),
    "axolotl input_output": Shape(
        "sft", {"segments": [{"label": False, "text": f"<s>{ASK}\n"}, {"label": True, "text": f"{SAY}</s>"}]}
    ),
    "axolotl chat_template": Shape(
        "sft",
        {
            "messages": [
                {"role": "user", "content": ASK},
                {"role": "assistant", "content": BAD, "training": False},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": SAY, "training": True},
            ]
        },
    ),
    "axolotl completion": Shape("sft", {"text": "Once upon a time."}),
    "parts of content (vision chats without pictures)": Shape(
        "sft",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": ASK}]},
                {"role": "assistant", "content": [{"type": "text", "text": SAY}]},
            ]
        },
    ),
    "LLaVA": Shape("sft", {"id": "1", "image": "coco/1.jpg", "conversations": told("<image>\nWhat is it?", "A cat.")}),
    # ---- tools --------------------------------------------------------------------------------------------------
    "xLAM function calling 60k": Shape(
        "sft", {"id": 1, "query": ASK, "answers": json.dumps([CALL]), "tools": json.dumps([SHORT_ADD])}
    ),
    "Glaive function calling v2": Shape(
        "sft",
        {
            "system": f"SYSTEM: You can use these functions. -\n{json.dumps(ADD)}",
            "chat": f"USER: {ASK}\n\n\nASSISTANT: <functioncall> {json.dumps(CALL)} <|endoftext|>\n\n\n"
            "FUNCTION RESPONSE: 4\n\n\nASSISTANT: 4. <|endoftext|>\n",
        },
    ),
    "Hermes function calling v1": Shape(
        "sft",
        {
            "id": "1",
            "conversations": [
                {"from": "system", "value": f"Call functions. <tools>{json.dumps([TOOL])}</tools>"},
                *told(ASK, f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"),
                {"from": "tool", "value": "<tool_response>\n4\n</tool_response>"},
                {"from": "gpt", "value": SAY},
            ],
            "tools": json.dumps([TOOL]),
            "category": "Math",
            "subcategory": "Sums",
            "task": "Add",
        },
    ),
    "ToolACE": Shape(
        "sft",
        {
            "system": f"Call functions: {json.dumps([ADD])}",
            "conversations": [
                *told(ASK, "[add(a=2)]", names=("user", "assistant")),
                {"from": "tool", "value": "4"},
                {"from": "assistant", "value": SAY},
            ],
        },
    ),
    "LLaMA-Factory v1": Shape("sft", {"messages": in_parts(ASK, SAY)}),
    "glaive_toolcall of LLaMA-Factory": Shape(
        "sft",
        {
            "conversations": [
                {"from": "human", "value": ASK},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": SAY},
            ],
            "tools": json.dumps([ADD]),
        },
    ),
    # ---- text ---------------------------------------------------------------------------------------------------
    "C4": Shape("sft", {"text": "Rain fell.", "timestamp": "2019-01-01", "url": "https://example.org"}),
    "WikiText": Shape("sft", {"text": " = Rain = \n"}),
    "Wikipedia": Shape("sft", {"id": "1", "url": "https://example.org", "title": "Rain", "text": "Rain is wet."}),
    "FineWeb": Shape(
        "sft",
        {
            "text": "Rain fell.",
            "id": "1",
            "dump": "CC",
            "url": "https://example.org",
            "date": "2019",
            "file_path": "s3",
            "language": "en",
            "language_score": 0.9,
            "token_count": 3,
        },
    ),
    "The Stack": Shape(
        "sft", {"content": "print(4)\n", "avg_line_length": 8.0, "lang": "Python", "size": 9, "ext": "py"}
    ),
    "TinyStories": Shape("sft", {"text": "Once there was a cat."}),
    # ---- preferences --------------------------------------------------------------------------------------------
    "UltraFeedback binarized": Shape(
        "dpo",
        {
            "prompt": ASK,
            "prompt_id": "1",
            "chosen": said(ASK, SAY),
            "rejected": said(ASK, BAD),
            "messages": said(ASK, SAY),
            "score_chosen": 8.0,
            "score_rejected": 3.0,
        },
    ),
    "HH-RLHF": Shape(
        "dpo", {"chosen": f"\n\nHuman: {ASK}\n\nAssistant: {SAY}", "rejected": f"\n\nHuman: {ASK}\n\nAssistant: {BAD}"}
    ),
    "orca_dpo_pairs": Shape("dpo", {"system": "Be brief.", "question": ASK, "chosen": SAY, "rejected": BAD}),
    "distilabel orca pairs": Shape(
        "dpo",
        {
            "system": "Be brief.",
            "input": ASK,
            "chosen": SAY,
            "rejected": BAD,
            "generations": [SAY, BAD],
            "rating": [9, 2],
        },
    ),
    "argilla DPO mix 7k": Shape(
        "dpo",
        {
            "dataset": "x",
            "chosen": said(ASK, SAY),
            "rejected": said(ASK, BAD),
            "chosen_rating": 5,
            "rejected_rating": 2,
        },
    ),
    "Tulu 3 preference mixture": Shape(
        "dpo", {"id": "1", "source": "x", "prompt": ASK, "chosen": said(ASK, SAY), "rejected": said(ASK, BAD)}
    ),
    "TRL pairs, conversational": Shape(
        "dpo", {"prompt": said(ASK), "chosen": said(ASK, SAY)[1:], "rejected": said(ASK, BAD)[1:]}
    ),
    "truthy-dpo": Shape("dpo", {"id": "1", "source": "x", "system": "", "prompt": ASK, "chosen": SAY, "rejected": BAD}),
    "DPO pairs of LLaMA-Factory": Shape(
        "dpo",
        {
            "conversations": told(ASK),
            "chosen": {"from": "gpt", "value": SAY},
            "rejected": {"from": "gpt", "value": BAD},
        },
    ),
    "OpenAI and Together preferences": Shape(
        "dpo",
        {
            "input": {"messages": said(ASK), "tools": [], "parallel_tool_calls": True},
            "preferred_output": said(ASK, SAY)[1:],
            "non_preferred_output": said(ASK, BAD)[1:],
        },
    ),
    "SHP": Shape(
        "dpo",
        {
            "post_id": "1",
            "domain": "x",
            "history": ASK,
            "human_ref_A": BAD,
            "human_ref_B": SAY,
            "labels": 0,
            "score_A": 3,
            "score_B": 9,
            "score_ratio": 3.0,
        },
    ),
    "PKU-SafeRLHF": Shape(
        "dpo",
        {
            "prompt": ASK,
            "response_0": BAD,
            "response_1": SAY,
            "is_response_0_safe": True,
            "is_response_1_safe": True,
            "better_response_id": 1,
            "safer_response_id": 1,
        },
    ),
    "Nectar": Shape(
        "dpo",
        {
            "prompt": f"\n\nHuman: {ASK}\n\nAssistant: ",
            "answers": [{"answer": SAY, "model": "a", "rank": 1.0}, {"answer": BAD, "model": "b", "rank": 2.0}],
            "turns": 1,
            "num_responses": 2,
            "source": ["x"],
            "good_natured": True,
        },
    ),
    "KTO mix 14k": Shape("dpo", {"prompt": said(ASK), "completion": said(ASK, SAY)[1:], "label": True, "dataset": "x"}),
    "DPO pairs of LLaMA-Factory v1": Shape(
        "dpo", {"chosen_messages": in_parts(ASK, SAY), "rejected_messages": in_parts(ASK, BAD)}
    ),
    "KTO rows of LLaMA-Factory": Shape("dpo", {"messages": said(ASK, SAY), "label": True}),
    "KTO rows of LLaMA-Factory, kto_tag": Shape(
        "dpo", {"instruction": ASK, "input": "", "output": SAY, "kto_tag": True}
    ),
    "stack-exchange-paired": Shape(
        "dpo",
        {"qid": 1, "question": ASK, "date": "2020", "metadata": ["x"], "response_j": SAY, "response_k": BAD},
        {"columns": {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}},
    ),
    # ---- labels -------------------------------------------------------------------------------------------------
    "IMDb, Rotten Tomatoes": Shape("classification", {"text": "Fine film.", "label": 1}),
    "AG News": Shape("classification", {"text": "Rain in Rome.", "label": 2}),
    "SST-2, CoLA": Shape("classification", {"sentence": "Fine film.", "label": 1, "idx": 0}),
    "MNLI, SNLI, ANLI": Shape(
        "classification", {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0, "idx": 0}
    ),
    "MRPC, RTE, PAWS": Shape(
        "classification", {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 1, "idx": 0}
    ),
    "QNLI": Shape("classification", {"question": "Who sang?", "sentence": "Ann sang.", "label": 0, "idx": 0}),
    "QQP": Shape("classification", {"question1": "Who sang?", "question2": "Who was singing?", "label": 1, "idx": 0}),
    "STS-B": Shape("classification", {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 3.8, "idx": 0}),
    "SICK": Shape(
        "classification",
        {"sentence_A": "It rains.", "sentence_B": "It is wet.", "label": 1, "relatedness_score": 4.5, "id": 1},
    ),
    "GoEmotions": Shape("classification", {"text": "Fine!", "labels": [3, 7], "id": "x"}),
    "Yelp, Amazon polarity": Shape(
        "classification", {"label": 1, "title": "Good", "content": "Works."}, {"columns": {"text": "content"}}
    ),
    "Banking77, Emotion": Shape("classification", {"text": "Card lost.", "label": 11}),
    "HelpSteer (a rating)": Shape(
        "classification",
        {
            "prompt": ASK,
            "response": SAY,
            "helpfulness": 4,
            "correctness": 4,
            "coherence": 4,
            "complexity": 0,
            "verbosity": 1,
        },
        {"columns": {"completion": "response", "score": "helpfulness"}},
    ),
    "ratings of conversations": Shape("classification", {"messages": said(ASK, SAY), "score": 4.5}),
    "app reviews": Shape("classification", {"text": "Fine app.", "rating": 4.5, "date": "2020"}),
    # ---- prompts for rewards ------------------------------------------------------------------------------------
    "GSM8K, for rewards": Shape("grpo", {"question": ASK, "answer": "#### 4"}),
    "verl (DAPO-Math)": Shape(
        "grpo",
        {
            "data_source": "math",
            "prompt": said(ASK),
            "ability": "MATH",
            "reward_model": {"ground_truth": "4", "style": "rule"},
            "extra_info": {"index": "1"},
        },
    ),
    "TRL prompts": Shape("grpo", {"prompt": said(ASK), "solution": "4"}),
    "RLVR (Tulu 3)": Shape("grpo", {"messages": said(ASK), "ground_truth": "4", "dataset": "gsm8k"}),
    "DeepScaleR": Shape("grpo", {"problem": ASK, "answer": "4", "solution": "2+2 = 4."}),
    "Big-Math": Shape(
        "grpo", {"prompt": ASK, "solution": "4", "source": "x", "domain": ["Algebra"], "llama8b_solve_rate": 0.5}
    ),
}
