"""Elements, numbers, tables, and the style sheet of a page."""

from cbtm_pipeline.html import page


def test_numbers_are_written_for_people():
    assert page.count(1234567.0) == "1\u202f234\u202f567"
    assert page.flops(3.93e13) == "3.93·10¹³" and page.flops(0) == "0" and page.flops(2.5e-3) == "2.50·10⁻³"
    assert page.decimals(None) == "–" and page.decimals(12345.678) == "12\u202f345.68"


def test_elements_escape_what_they_hold():
    assert page.tag("p", 'a<b & "c"', title='"<') == '<p title="&quot;&lt;">a&lt;b &amp; &quot;c&quot;</p>'
    assert page.tag("p", page.tag("b", 1), class_="x", aria_label=None) == '<p class="x"><b>1</b></p>'
    assert page.table(["<"], [["<i>"]]).count("&lt;") == 2


def test_the_style_sheet_is_inside_the_page():
    text = page.page("a < b", page.Html("<p>c</p>"))
    style = text.split("<style>\n")[1].split("\n</style>")[0]
    assert style.startswith(":root {") and style.endswith("}") and "<" not in style
    assert "<title>a &lt; b</title>" in text and "<main><p>c</p>\n</main>" in text
