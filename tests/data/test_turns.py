"""Turns as other tools, APIs and writers of tables have them."""

import json
from collections import Counter

import pytest

from ftlit.data.formats import (
    Alpaca,
    Completion,
    Conversation,
    Message,
    Messages,
    PromptCompletion,
    RawText,
    RowError,
    ShareGPT,
)
from ftlit.data.formats.base import noting
from ftlit.data.formats.turns import ROLE_OF, as_turns, turns_of, weight_of_turn
from ftlit.data.formats.written import parsed
from ftlit.errors import ConfigError

ASK, ANSWER = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}
USER, BOT = Message("user", "Hi?"), Message("assistant", "Yes.")


def read(*turns, **columns):
    return Messages()({"messages": list(turns), **columns})


def refused(turn, **columns):
    with pytest.raises(RowError) as error:
        read(ASK, turn, **columns)
    return str(error.value)


def call(name="add", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


# ---- roles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("User", "user"),
        ("ASSISTANT", "assistant"),
        ("System", "system"),
        (" human ", "user"),
        ("prompter", "user"),
        ("model", "assistant"),
        ("bot", "assistant"),
        ("GPT", "assistant"),
        ("Chatbot", "assistant"),
        ("ipython", "tool"),
        ("function", "tool"),
        ("tool_response", "tool"),
        ("developer", "system"),
    ],
)
def test_roles_have_the_names_of_other_tools(name, role):
    for who, says in (("role", "content"), ("from", "value"), ("role", "value"), ("role", "text")):
        (message,) = turns_of({"c": [{who: name, says: "x"}]}, "c")
        assert message == Message(role, "x")


def test_a_role_map_names_further_roles():
    row = {"messages": [{"role": "Narrator", "content": "x"}, {"role": "gpt", "content": "y"}]}
    roles = {"narrator": "user", "gpt": "tool"}
    assert [m.role for m in Messages(roles=roles)(row).messages] == ["user", "tool"]
    row = {"conversations": [{"from": "NARRATOR", "value": "x"}, {"from": "hero", "value": "y"}]}
    assert [m.role for m in ShareGPT(roles={"narrator": "system", "Hero": "assistant"})(row).messages] == [
        "system",
        "assistant",
    ]
    with pytest.raises(ConfigError, match="roles gives 'hero' the role 'bot'; it must be one of system, user"):
        Messages(roles={"hero": "bot"})


def test_every_known_role_is_in_small_letters_and_one_of_ours():
    assert all(name == name.casefold() for name in ROLE_OF)


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "user", "content": "Hi?"}, {"from": "gpt", "value": "Yes."}],
        [{"from": "human", "value": "Hi?", "role": None, "content": None}, {"from": "gpt", "value": "Yes."}],
        [{"role": "user", "content": "Hi?", "value": "Hi?"}, ANSWER],
        [{"human": "Hi?", "assistant": "Yes."}],
        [{"assistant": "Yes.", "human": "Hi?", "system": None}],
        [{"user": "Hi?"}, {"assistant": "Yes."}],
        {"role": ["user", "assistant"], "content": ["Hi?", "Yes."]},
        {"from": ["human", "gpt"], "value": ["Hi?", "Yes."], "weight": None},
        json.dumps([ASK, ANSWER]),
        str([ASK, ANSWER]),
        [json.dumps(ASK), json.dumps(ANSWER)],
        ["Hi?", "Yes."],
        [{"role": "user", "parts": [{"text": "Hi?"}]}, {"role": "model", "parts": [{"text": "Yes."}]}],
        [{"role": "User", "message": "Hi?"}, {"role": "Chatbot", "message": "Yes."}],
        [{"speaker": "human", "text": "Hi?"}, {"speaker": "bot", "text": "Yes."}],
        [ASK, {"role": "assistant", "from": "gpt", "content": None, "refusal": "Yes."}],
    ],
)
def test_one_conversation_in_many_shapes(turns):
    assert Messages()({"messages": turns}).messages == (USER, BOT)
    assert ShareGPT()({"conversations": turns}).messages == (USER, BOT)


def test_texts_without_roles_are_noted_and_must_be_pairs():
    with noting(notes := Counter()):
        assert [m.role for m in read("a", "b", "c", "d").messages] == ["user", "assistant"] * 2
    assert list(notes) == ["turns without a role are read as a user's and an assistant's, one after the other"]
    for turns in (["a"], ["a", "b", "c"], ["a", ANSWER]):
        with pytest.raises(RowError, match=r"'messages\[0\]' must hold an object with role and content, got 'a'"):
            read(*turns)


def test_texts_that_differ_in_one_turn_are_refused():
    said = refused({"role": "assistant", "content": "Yes.", "value": "No."})
    assert said == "column 'messages[1].value' must hold what content holds, or nothing, got 'No.'."


def test_two_roles_that_differ_in_one_turn_are_refused():
    said = refused({"role": "assistant", "from": "human", "content": "x"})
    assert said == "column 'messages[1].from' must hold what role says (assistant), or nothing, got 'human'."
    assert "'messages[1].from' must hold what role says" in refused(
        {"role": "assistant", "from": "Ada", "content": "x"}
    )


def test_a_tool_may_answer_nothing():
    assert read(ASK, {"role": "tool", "content": None}).messages[1] == Message("tool", "")


@pytest.mark.parametrize("kind", [Messages, ShareGPT])
def test_what_no_one_reads_of_a_turn_goes_to_the_template(kind):
    column = kind.columns[0]
    who, says = ("role", "content") if kind is Messages else ("from", "value")
    turns = [
        {who: "user", says: "2+2?", "name": "Ada"},
        {who: "assistant", says: "4", "reasoning_content": "Two and two.", "refusal": None},
    ]
    messages = kind()({column: turns}).messages
    assert messages == (
        Message("user", "2+2?", more={"name": "Ada"}),
        Message("assistant", "4", more={"reasoning_content": "Two and two."}),
    )


# ---- marks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marks", "weight"),
    [
        ({}, 1),
        ({"weight": 0}, 0),
        ({"weight": 0.5}, 0.5),
        ({"weight": "0.25"}, 0.25),
        ({"train": False}, 0),
        ({"train": 0}, 0),
        ({"train": True}, 1),
        ({"training": False}, 0),
        ({"trainable": False}, 0),
        ({"loss": False}, 0),
        ({"loss": True}, 1),
        ({"loss": 0.5}, 0.5),
        ({"loss_mask": 0}, 0),
        ({"loss_mask": 1}, 1),
        ({"loss_weight": 0.0}, 0),
        ({"loss_weight": 2}, 2),
        ({"loss_scale": 0.0}, 0),
        ({"masked": True}, 0),
        ({"masked": False, "train": True}, 1),
        ({"masked": True, "weight": 0}, 0),
        ({"train": None, "weight": None, "loss": None}, 1),
        ({"train": False, "weight": 0, "loss_mask": 0}, 0),
        ({"train": True, "weight": 0.5}, 0.5),
        ({"loss": True, "loss_weight": 0.5, "weight": 0.5}, 0.5),
        ({"train_detail": []}, 1),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": True}]}, 1),
    ],
)
def test_marks_of_every_tool_are_read(marks, weight):
    assert weight_of_turn(marks, "turn") == weight
    assert read(ASK, {**ANSWER, **marks}).messages == (USER, BOT._replace(weight=weight))
    turn = {"from": "gpt", "value": "Yes.", **marks}
    assert ShareGPT()({"conversations": [{"from": "human", "value": "Hi?"}, turn]}).messages[1].weight == weight


@pytest.mark.parametrize(
    ("marks", "said"),
    [
        ({"train": False, "weight": 1}, "messages[1].weight' must hold what the turn's train says (False), got 1."),
        ({"loss": True, "weight": 0}, "messages[1].loss' must hold what the turn's weight says (0), got True."),
        ({"train": True, "loss_mask": 0}, "messages[1].loss_mask' must hold what the turn's train says (True), got 0."),
        ({"weight": 0.5, "loss": 0.2}, "messages[1].loss' must hold what the turn's weight says (0.5), got 0.2."),
        (
            {"trainable": True, "weight": 0.5, "loss_weight": 2},
            "messages[1].loss_weight' must hold what the turn's weight says (0.5), got 2.",
        ),
        ({"train": True, "masked": True}, "messages[1].masked' must hold what the turn's train says (True), got True."),
        ({"train": "no"}, "messages[1].train' must hold true or false, got 'no'."),
        ({"trainable": 0.5}, "messages[1].trainable' must hold true or false, got 0.5."),
        ({"loss": "no"}, "messages[1].loss' must hold a number of at least 0, got 'no'."),
        ({"loss_mask": [0, 1]}, "messages[1].loss_mask' must hold a number of at least 0, got [0, 1]."),
        ({"mask": 1}, "messages[1].mask' must hold nothing: does it mean trained, or left out? Call it train"),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]},
            "messages[1].train_detail' must hold nothing that leaves out a part of a turn: a turn is trained whole",
        ),
    ],
)
def test_marks_that_contradict_each_other_or_cannot_be_followed_are_refused(marks, said):
    assert f"column '{said}" in refused({**ANSWER, **marks})


@pytest.mark.parametrize(
    ("marks", "noted"), [({"train": True}, 1), ({"loss": 1}, 1), ({"weight": 1}, 0), ({"loss": 0}, 0)]
)
def test_marks_of_questions_are_noted_where_they_ask_for_training(marks, noted):
    with noting(notes := Counter()):
        read({**ASK, **marks}, {**ANSWER, **marks})
    assert len(notes) == noted


# ---- tools and calls ------------------------------------------------------------------------------------------------

ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    "given",
    [
        {"tool_calls": [ADD]},
        {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": "{'a': 1}"}}]},
        {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": json.dumps('{"a": 1}')}}]},
        {"tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
        {"tool_calls": [{"name": "add", "parameters": {"a": 1}}]},
        {"tool_calls": [{"function": json.dumps({"name": "add", "arguments": {"a": 1}})}]},
        {"tool_calls": {"name": "add", "arguments": {"a": 1}}},
        {"tool_calls": json.dumps([ADD])},
        {"tool_calls": str([ADD])},
        {"tool_calls": [json.dumps(ADD)]},
        {"tool_calls": [{"name": "add", "arguments": [["a", 1]]}]},
        {"tool_calls": [{"name": "add", "arguments": [{"key": "a", "value": 1}]}]},
        {"function_call": {"name": "add", "arguments": '{"a": 1}'}},
        {"function_call": '{"name": "add", "arguments": {"a": 1}}'},
        {"function_call": {"name": "add", "arguments": '{"a": 1}'}, "tool_calls": None},
        {"function_call": {"name": "add", "arguments": '{"a": 1}'}, "tool_calls": [ADD]},
        {"function_call": {"name": None, "arguments": None}, "tool_calls": [ADD]},
        {"content": [{"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 1}}'}]},
        {"content": [{"type": "tool_call", "tool_call": {"name": "add", "arguments": {"a": 1}}}]},
        {"content": [{"type": "toolCall", "name": "add", "arguments": {"a": 1}}]},
        {"content": [{"type": "tool_use", "name": "add", "input": {"a": 1}}]},
        {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 1}}'},
        {"role": "function_call", "content": "{'name': 'add', 'arguments': {'a': 1}}"},
        {"role": "function_call", "content": [{"name": "add", "arguments": {"a": 1}}]},
    ],
)
def test_one_call_in_many_shapes(given):
    turn = {"role": "assistant", "content": None, **given}
    assert read(ASK, turn).messages == (USER, Message("assistant", "", more={"tool_calls": [ADD]}))


def test_calls_keep_what_they_say():
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "say", "arguments": '{"what": "Öl \\u00e9\\n", "n": 1.50, "of": [null, {"x": "{}"}]}'},
    }
    turns = read(
        ASK,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call, {**call, "id": "c2"}]},
        {"role": "tool", "content": "1", "tool_call_id": "c1", "name": "say"},
        {"role": "tool", "content": {"temp": 3, "où": "là"}, "tool_call_id": "c2"},
    ).messages
    wanted = {"name": "say", "arguments": {"what": "Öl é\n", "n": 1.5, "of": [None, {"x": "{}"}]}}
    assert turns[1].content == "Let me see."
    assert [(c["id"], c["type"], c["function"]) for c in turns[1].more["tool_calls"]] == [
        ("c1", "function", wanted),
        ("c2", "function", wanted),
    ]
    assert turns[2:] == (
        Message("tool", "1", more={"tool_call_id": "c1", "name": "say"}),
        Message("tool", '{"temp": 3, "où": "là"}', more={"tool_call_id": "c2"}),
    )


@pytest.mark.parametrize("arguments", ["", "{}", None, {}, " ", "null"])
def test_a_call_without_arguments_has_an_empty_object(arguments):
    turn = {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": arguments}}]}
    assert read(ASK, turn).messages[1].more == {"tool_calls": [call("now")]}


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"tool_calls": [{"function": {"name": "f", "arguments": "city=Rome"}}]}, "[0].arguments' must hold an object"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "[1, 2]"}}]}, "[0].arguments' must hold an object"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": 3}}]}, "[0].arguments' must hold an object, or its"),
        ({"tool_calls": [{"function": {"arguments": "{}"}}]}, "[0]' must hold a call with name and arguments"),
        ({"tool_calls": ["add(1)"]}, "[0]' must hold a call with name and arguments"),
        ({"tool_calls": "add(1)"}, "must hold a list of calls, got 'add(1)'."),
        (
            {"role": "user", "content": "x", "tool_calls": [ADD]},
            "must hold calls in a turn of the assistant, got 'user'",
        ),
        ({"tool_calls": [ADD], "function_call": {"name": "mul", "arguments": {}}}, "must hold the call of tool_calls"),
    ],
)
def test_what_is_no_call_is_refused(turn, said):
    assert said in refused({"role": "assistant", "content": "", **turn})


def test_calls_in_turns_of_their_own_belong_to_the_answer_before():
    turns = [
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "I look."},
        {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 1}}'},
        {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 2}}'},
        {"role": "tool_response", "content": "1"},
        {"role": "tool_response", "content": "2"},
        {"role": "assistant", "content": "Done."},
    ]
    messages = read(*turns).messages
    assert [m.role for m in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert messages[1] == Message("assistant", "I look.", more={"tool_calls": [call(a=1), call(a=2)]})
    apart = read(*turns[:2], {**turns[2], "loss": False}).messages
    assert [m.weight for m in apart] == [1, 1, 0]


def test_a_thought_before_a_call_stays():
    turn = {"from": "function_call", "value": '<think>\nAdd.\n</think>\n\n{"name": "add", "arguments": {"a": 1}}'}
    (message,) = ShareGPT()({"conversations": [turn]}).messages
    assert message == Message("assistant", "<think>\nAdd.\n</think>\n\n", more={"tool_calls": [ADD]})


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}}


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": str([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"tools": TOOL},
        {"tools": [TOOL["function"]]},
        {"tools": [{**TOOL["function"], "parameters": json.dumps(SCHEMA)}]},
        {"tools": [{**TOOL["function"], "parameters": {**SCHEMA, "properties": {"a": '{"type": "integer"}'}}}]},
        {"tools": [{"name": "add", "description": "Adds.", "input_schema": SCHEMA}]},
        {"tools": [{"function": TOOL["function"]}]},
        {"functions": [TOOL["function"]]},
        {"functions": json.dumps([TOOL["function"]]), "tools": None},
        {"tools": [TOOL], "functions": [TOOL["function"]]},
    ],
)
def test_one_tool_in_many_shapes(columns):
    assert read(ASK, ANSWER, **columns).tools == (TOOL,)
    if "tools" in columns:
        alpaca = Alpaca()({"instruction": "i", "output": "o", "tools": columns["tools"]})
        assert alpaca.tools == ((TOOL,) if columns["tools"] else None)


@pytest.mark.parametrize("tools", [None, [], "", " ", "[]", {}, "{}", "null", "None"])
def test_no_tools_in_many_shapes(tools):
    assert read(ASK, ANSWER, tools=tools).tools is None


def test_a_tool_of_another_kind_is_left_as_it_is():
    assert read(ASK, ANSWER, tools=[{"type": "code_interpreter"}]).tools == ({"type": "code_interpreter"},)


def test_tools_in_a_turn_are_the_tools_of_the_row():
    system = {"role": "system", "content": "Be kind.", "tools": json.dumps([TOOL])}
    wanted = Conversation((Message("system", "Be kind."), USER, BOT), (TOOL,))
    assert read(system, ASK, ANSWER) == read(system, ASK, ANSWER, tools=[TOOL]) == wanted
    parts = [{"type": "text", "value": "Be kind."}, {"type": "tools", "value": json.dumps([TOOL])}]
    assert read({"role": "system", "content": parts}, ASK, ANSWER) == wanted
    with pytest.raises(RowError, match="'tools' must hold the same tools as the turns, or nothing"):
        read(system, ASK, ANSWER, tools=[{"name": "mul"}])


# ---- nulls that tables fill objects up with -------------------------------------------------------------------------


def arguments_of(arguments, tools=None, **extra):
    notes = Counter()
    turn = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": arguments}}]}
    with noting(notes):
        record = read({**ASK, **extra}, turn, tools=tools)
    return record.messages[1].more["tool_calls"][0]["function"]["arguments"], list(notes)


def tool(required=(), **properties):
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return [{"type": "function", "function": {"name": "add", "parameters": schema}}]


TEXT, MAYBE = {"type": "string"}, {"type": ["string", "null"]}
KEPT = "calls have arguments that are null: they are kept"
LEFT = "calls have arguments that are null, as tables fill objects up: they are read as not given"


@pytest.mark.parametrize(
    ("arguments", "tools", "turn", "wanted", "notes"),
    [
        ({"a": "x", "sym": None}, tool(a=TEXT), {}, {"a": "x"}, []),
        ({"a": None}, tool(a=MAYBE), {}, {"a": None}, []),
        ({"a": None}, tool(a={"anyOf": [TEXT, {"type": "null"}]}), {}, {"a": None}, []),
        ({"a": None}, tool(a={**TEXT, "nullable": True}), {}, {"a": None}, []),
        ({"a": None}, tool(["a"], a=TEXT), {}, {"a": None}, []),
        ({"a": None}, tool(a=TEXT), {}, {"a": None}, [KEPT]),
        ({"a": None, "sym": None}, tool(a=TEXT), {}, {}, [LEFT]),
        ({"a": "x", "sym": None}, None, {}, {"a": "x", "sym": None}, [KEPT]),
        ({"a": "x", "sym": None}, None, {"tool_calls": None}, {"a": "x"}, [LEFT]),
        ({"a": {"b": None, "c": 1}}, tool(a={"properties": {"c": {}}}), {}, {"a": {"c": 1}}, []),
        ({"a": [{"b": None, "c": 1}]}, tool(a={"items": {"properties": {"c": {}}}}), {}, {"a": [{"c": 1}]}, []),
        ({"a": [None]}, tool(a={"type": "array"}), {}, {"a": [None]}, []),
    ],
)
def test_null_arguments_go_where_the_row_could_not_have_meant_them(arguments, tools, turn, wanted, notes):
    assert arguments_of(arguments, tools, **turn) == (wanted, notes)
    assert arguments_of(json.dumps(arguments), tools, **turn) == (wanted, notes)


def test_nulls_in_the_schemas_of_tools_go():
    filled = tool(["a"], a={"type": "string", "enum": None, "default": None}, sym=None)
    filled[0]["function"] |= {"description": None, "strict": None}
    assert read(ASK, ANSWER, tools=filled).tools == tuple(tool(["a"], a=TEXT))
    meant = tool(
        a={"type": "string", "default": None}, b={"enum": ["x", None], "const": None}, c={"default": {"x": None}}
    )
    assert read(ASK, ANSWER, tools=meant).tools == tuple(meant)
    assert read(ASK, ANSWER, tools=tool(default=None, a=TEXT)).tools == tuple(tool(a=TEXT))


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "Yes."}],
        [{"type": "text", "value": "Yes."}],
        [{"type": "text", "content": "Yes."}],
        [{"type": "text", "text": "Ye"}, {"type": "text", "text": "s."}],
        [{"type": "text", "text": "Yes.", "image_url": None, "cache_control": {"type": "ephemeral"}}],
        [{"type": "output_text", "text": "Yes.", "annotations": []}],
        ["Ye", {"type": "text", "text": "s."}],
        {"type": "text", "text": "Yes."},
    ],
)
def test_parts_of_text_are_text(content):
    assert read(ASK, {"role": "assistant", "content": content}).messages == (USER, BOT)
    turn = {"from": "gpt", "value": content}
    assert ShareGPT()({"conversations": [{"from": "human", "value": "Hi?"}, turn]}).messages == (USER, BOT)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "reasoning", "value": "Two."},
        {"type": "reasoning", "reasoning": "Two."},
        {"type": "thinking", "thinking": "Two.", "signature": "c2ln"},
        {"type": "thinking", "thinking": [{"type": "text", "text": "Two."}]},
        {"type": "reasoning", "text": "Two."},
    ],
)
def test_parts_of_reasoning_are_the_reasoning_of_the_turn(part):
    turn = {"role": "assistant", "content": [part, {"type": "text", "text": "4"}]}
    assert read(ASK, turn).messages[1] == Message("assistant", "4", more={"reasoning_content": "Two."})
    assert "must hold reasoning before the text" in refused({**turn, "content": turn["content"][::-1]})


def test_parts_of_calls_and_results_are_turns():
    messages = read(
        ASK,
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}},
                {"type": "tool_use", "id": "t2", "name": "add", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "1"},
                {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "2"}]},
                {"type": "text", "text": "And?"},
            ],
        },
        ANSWER,
    ).messages
    calls = [{"id": "t1", **call(a=1)}, {"id": "t2", **call()}]
    assert [sorted(c.items(), key=str) for c in messages[1].more["tool_calls"]] == [
        sorted(c.items(), key=str) for c in calls
    ]
    assert messages[1].content == "I look."
    assert messages[2:] == (
        Message("tool", "1", more={"tool_call_id": "t1"}),
        Message("tool", "2", more={"tool_call_id": "t2"}),
        Message("user", "And?"),
        BOT,
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"type": "image", "image": "a.png"}], "content[0]' must hold text: ftlit trains on no images"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "content[0]' must hold text: ftlit trains on no images"),
        (
            [{"type": "text", "text": "a"}, {"type": "input_audio"}],
            "content[1]' must hold text: ftlit trains on no audios",
        ),
        ([{"type": "video", "video": "a"}], "content[0]' must hold text: ftlit trains on no videos"),
        ([{"type": "server_event"}], "content[0]' must hold parts of type text, reasoning, tool_call"),
        ([{"type": "text", "text": "a", "image_url": "x"}], "content[0]' must hold nothing but its type and text"),
        ([{"type": "text", "text": 3}], "content[0].text' must hold text, got 3."),
        ([{"type": "text"}], "content[0].text' must hold text, got null or nothing."),
        ([], "content' must hold non-empty text, got ''."),
        (
            [{"type": "tool_use", "name": "f", "input": {}}, {"type": "text", "text": "a"}],
            "must hold text before the calls",
        ),
    ],
)
def test_parts_that_are_no_text_are_refused(content, said):
    assert said in refused({"role": "assistant", "content": content})


@pytest.mark.parametrize(
    ("columns", "column"),
    [
        ({"images": ["a.png"]}, "images"),
        ({"videos": [["a.mp4"]]}, "videos"),
        ({"audios": "a.wav"}, "audios"),
        ({"image": {"bytes": b"x", "path": None}}, "image"),
        ({"image": "a.png", "about": "<image>"}, "image"),
    ],
)
def test_images_and_the_like_are_refused_unless_they_are_empty(columns, column):
    empty = {column: [] if column.endswith("s") else {"bytes": None, "path": None}}
    for kind, row in {
        Messages: {"messages": [ASK, ANSWER]},
        ShareGPT: {"conversations": [ASK, ANSWER]},
        Alpaca: {"instruction": "i", "output": "o"},
        PromptCompletion: {"prompt": "i", "completion": "o"},
        RawText: {"text": "t"},
    }.items():
        with pytest.raises(RowError, match=f"column '{column}' must hold nothing: ftlit trains on text alone"):
            kind()({**row, **columns})
        assert kind()({**row, **empty, "video": None, "audios": [None]}) == kind()(row)
        assert kind()({**row, "image": "https://example.org/a.png"}) == kind()(row)


def test_images_of_a_turn_are_refused_unless_they_are_empty():
    assert "column 'messages[1].images' must hold nothing" in refused({**ANSWER, "images": ["a.png"]})
    assert read(ASK, {**ANSWER, "images": [], "audio": None}).messages == (USER, BOT)


# ---- beside the turns -----------------------------------------------------------------------------------------------

SYSTEM = Message("system", "Be kind.")


def test_a_system_column_opens_the_conversation():
    wanted = (SYSTEM, USER, BOT)
    assert read(ASK, ANSWER, system="Be kind.").messages == wanted
    assert ShareGPT()({"conversations": [ASK, ANSWER], "system": "Be kind."}).messages == wanted
    row = {"prompt": [ASK], "completion": [ANSWER], "system": "Be kind."}
    assert PromptCompletion()(row) == Conversation(wanted, given=2)
    assert PromptCompletion().prompt(row) == Conversation(wanted[:2])
    row = {"prompt": "Hi?", "completion": "Yes.", "system": "Be kind."}
    assert PromptCompletion()(row) == Conversation(wanted, given=2)
    assert PromptCompletion()({**row, "system": None}) == Conversation(wanted[1:], given=1)
    for system in (None, "", " "):
        assert read(ASK, ANSWER, system=system).messages == wanted[1:]


def test_two_system_turns_that_differ_are_refused():
    turn = {"role": "system", "content": "Be kind."}
    assert read(turn, ASK, ANSWER, system="Be kind.\n").messages == (SYSTEM, USER, BOT)
    with pytest.raises(RowError, match="column 'system' must hold what the system turn says, or nothing"):
        read(turn, ASK, ANSWER, system="Be brief.")


def test_prompts_and_completions_that_are_text_of_lists():
    row = {"prompt": str([ASK]), "completion": json.dumps([ANSWER])}
    assert PromptCompletion()(row) == Conversation((USER, BOT), given=1)
    for text in ("[INST] Hi? [/INST]", "[1, 2]", '[{"a": 1}]', "[]", '{"role": "user"}'):
        assert as_turns(text) == text
        row = {"prompt": text, "completion": json.dumps([ANSWER])}
        assert PromptCompletion()(row) == Completion(text, json.dumps([ANSWER]))


def test_tools_beside_texts_are_refused():
    with pytest.raises(RowError, match="column 'tools' must hold nothing where prompt and completion are texts"):
        PromptCompletion()({"prompt": "a", "completion": "b", "tools": [TOOL]})


def test_history_as_text():
    row = {"instruction": "i", "output": "o", "history": '[["a", "b"]]'}
    assert [m.content for m in Alpaca()(row).messages] == ["a", "b", "i", "o"]


@pytest.mark.parametrize("text", ["[1, 2", "{'a': nan}", "[__import__('os')]", "{" * 100_000, "plain", ""])
def test_text_that_is_neither_json_nor_python_stays_text(text):
    assert parsed(text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[{'a': 'x'} {'a': 'y'}]", [{"a": "x"}, {"a": "y"}]),
        ("[{'a': 'x'}\n {'a': 'y'}]", [{"a": "x"}, {"a": "y"}]),
        ("['x' 'y']", ["x", "y"]),
        ("[{'a': array(['x', 'y'], dtype=object), 'b': None}]", [{"a": ["x", "y"], "b": None}]),
        ("[array([{'a': 1}], dtype=object) array([], dtype=object)]", [[{"a": 1}], []]),
        ("[{'a': \"it's array(1, dtype=object) ' '\"}]", [{"a": "it's array(1, dtype=object) ' '"}]),
        ("[('x', True), ('y', -1.5)]", [("x", True), ("y", -1.5)]),
        ("['x' ... 'y']", "['x' ... 'y']"),
        ("['x' 'y'", "['x' 'y'"),
    ],
)
def test_what_numpy_prints_is_read_and_never_run_together(text, value):
    assert parsed(text) == value
