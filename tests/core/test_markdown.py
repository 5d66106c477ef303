"Texts of others in markdown: they are shown and do nothing."

import pytest

from dfsbir.core.markdown import markdown_text


@pytest.mark.parametrize("text", ["cup", "alarm clock", "12", "été"])
def test_a_plain_text_stays_as_it_is(text):
    assert markdown_text(text) == text


@pytest.mark.parametrize(
    "text, shown",
    [
        ("<img src=x>", "&lt;img src=x&gt;"),
        ("a|b", r"a\|b"),
        ("**a** `b` _c_", r"\*\*a\*\* \`b\` \_c\_"),
        ("[a](b) &lt; c\\", r"\[a\](b) &amp;lt; c\\"),
        ("two\nlines", "two lines"),
        ({"a": [1]}, r"{'a': \[1\]}"),
    ],
)
def test_what_markdown_would_read_as_its_own_is_escaped(text, shown):
    assert markdown_text(text) == shown
