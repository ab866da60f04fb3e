def test_a_chat_template_may_be_given_as_text(ftlit, fit_args):
    """One line, longer than any file name may be."""
    text = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}" + "{# #}" * 60
    )
    assert ftlit(*fit_args, "--data.chat_template", text, "--run", "r", "--trainer.max_steps", "1") == 0
    assert "assistant:⟦" in ftlit.out
    assert ftlit("generate", "r", "--prompt", "Hi", "--max_new_tokens", "1") == 0
