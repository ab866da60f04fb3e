"""Numbers in answers, as people and models write them."""

import math
from fractions import Fraction

import pytest

from ftlit.metrics.numbers import Number, answer_number, numbers_in, plain_numbers

F = Fraction


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # signs
        ("−5", -5), ("–5", -5), ("it is -5", -5), ("3–5", 5), ("(-7)", -7), ("2-3=-1", -1), ("x = - 5", -5),
        ("- 5 apples", 5), ("7 − 9 = −2", -2),
        ("答案是-5。", -5), ("她还剩−7元", -7), ("คำตอบคือ-5", -5), ("3元-5元", 5), ("2020年-2021年", 2021),
        # currency
        ("$-5", -5), ("-$5", -5), ("−€5.50", F(-11, 2)), ("- $ 5", -5), ("USD1,234.50.", F(2469, 2)), ("Rs.50", 50),
        ("\\$29.00", 29), ("$3-$5", 5),
        # thousands
        ("1,000,000", 10**6), ("12,34,567", 1234567), ("1'234", 1234), ("1_000", 1000), ("1\u00a0000", 1000),
        ("1\u202f000.5", F(2001, 2)), (r"1{,}234", 1234), (r"10\,000", 10000), (r"1,\!000", 1000), ("1,2,3", 3),
        ("72 clips, altogether.", 72),
        # fractions and boxes in LaTeX's short forms
        (r"\frac1{2}", F(1, 2)), (r"\frac{1}2", F(1, 2)), (r"\frac{3}{-4}", F(-3, 4)), (r"\fbox{5} of 6", 5),
        # exponents
        ("6.02·10^23", 602 * 10**21), ("2⋅10^3", 2000),
        ("1e5", 10**5), ("1.5E-3", F(15, 10000)), ("1.5 x 10^3", 1500), ("1.5 × 10^{-3}", F(15, 10000)),
        ("1.5*10**3", 1500), (r"1.5 \times 10^{3}", 1500), ("10^3", 1000), ("10³", 1000), ("10⁻²", F(1, 100)),
        ("5 m²", 5), ("5 m^2", 5), ("x_1", None), (r"9 = \log_{10}", 9), ("**42**", 42), ("__42__", 42), ("2^10", 1024),
        # fractions
        ("3/4", F(3, 4)), ("-3/4", F(-3, 4)), (r"\frac{3}{4}", F(3, 4)), (r"-\dfrac{3}{4}", F(-3, 4)),
        (r"\tfrac34", F(3, 4)), (r"$\frac{-1}{2}$", F(-1, 2)), ("1 3/4", F(7, 4)), ("1½", F(3, 2)), ("½", F(1, 2)),
        (r"2\frac{1}{2}", F(5, 2)), ("1,000/2", 500), ("12/05/2024", 2024),
        # marks
        (r"\boxed{42} in 3 hours", 42), (r"\boxed{\frac{1}{2}} of 9", F(1, 2)), (r"\boxed{x = 3", 3),
        (r"#### 5 \boxed{6}", 6), (r"\boxed{6} #### 5", 5), (r"\boxed{A} 7", 7), (r"\boxed{1} then \boxed{2} of 3", 2),
        # no answers
        ("9" * 5000, None), ("no number", None), ("1/0 or 0^-1", None),
    ],
)  # fmt: skip
def test_the_number_of_an_answer(text, value):
    found = answer_number(text)
    assert (found and found.value) == value


def test_percent_is_a_unit_or_a_share():
    half, fifty, share = (answer_number(text) for text in ("0.5", "50", r"50\%"))
    assert share == Number(F(50), True)
    assert answer_number("50 percent") == share
    assert share.same(fifty)
    assert fifty.same(share)
    assert share.same(half)
    assert not half.same(fifty)
    assert not answer_number("0.5%").same(share)


def test_numbers_are_exact_and_in_their_order():
    assert [one.value for one in numbers_in("0.1, 1/3 and 9007199254740993")] == [F(1, 10), F(1, 3), 9007199254740993]
    assert math.isinf(Number(F(10) ** 500).decimal)
    assert Number(F(-10) ** 501).decimal == -math.inf
    assert plain_numbers("1½ x²") == "1 1/2 x^2"
