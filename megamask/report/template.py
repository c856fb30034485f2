"""The HTML pages of the report and of a comparison, jinja2 templates. They refer to no file outside
themselves.
"""

_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
         color: #222; background: #fff; margin: 0; }
  main { max-width: 1080px; margin: 0 auto; padding: 28px 24px 60px; }
  h1 { font-size: 25px; margin: 0 0 4px; }
  h2 { font-size: 18px; margin: 40px 0 10px; border-bottom: 1px solid #ddd; padding-bottom: 4px; }
  .lead { font-size: 17px; margin: 12px 0 4px; }
  .quiet, figcaption { color: #666; font-size: 13.5px; }
  .missing { color: #777; font-style: italic; background: #f6f6f6; padding: 8px 12px;
             border-left: 3px solid #ccc; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { padding: 5px 14px 5px 0; text-align: left; vertical-align: top;
           border-bottom: 1px solid #e8e8e8; }
  th { font-weight: 600; color: #444; }
  table.numbers :is(th, td):not(:first-child) { text-align: right; padding: 5px 0 5px 22px;
                                                white-space: nowrap; }
  tr.learned td { font-weight: 700; background: #fdf1e9; }
  td.value { overflow-wrap: anywhere; }
  figure { margin: 14px 0 26px; }
  img { max-width: 100%; height: auto; }
  pre { background: #f6f6f6; padding: 12px 14px; overflow-x: auto; font-size: 13px;
        line-height: 1.4; }
  details { margin: 8px 0; }
  summary { cursor: pointer; }
</style>
</head>
<body>
{% macro numbers(table) %}{% if table.rows %}
<div class="scroll"><table{% if not table.is_text %} class="numbers"{% endif %}>
<thead><tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for method, cells in table.rows %}<tr{% if method == "learned" %} class="learned"{% endif %}>
{%- for cell in cells %}<td{% if table.is_text %} class="value"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>
{% endfor %}</tbody>
</table></div>{% endif %}
{% for note in table.notes %}<p class="quiet">{{ note }}</p>
{% endfor %}{% endmacro %}
{% macro shown(pictures) %}{% for picture in pictures %}
{% if picture.data %}<figure><img alt="{{ picture.title }}"
src="data:image/png;base64,{{ picture.data }}">
<figcaption>{{ picture.caption }}</figcaption></figure>
{% else %}<p class="missing">{{ picture.title }}: not there yet. {{ picture.missing }}</p>
{% endif %}{% endfor %}{% endmacro %}
<main>
<h1>{{ title }}</h1>
"""

PAGE = (
    _HEAD
    + """<p class="quiet">{{ subtitle }}</p>
{% for sentence in said %}<p class="missing">{{ sentence }}</p>
{% endfor %}
{% for sentence in findings %}<p class="lead">{{ sentence }}</p>
{% endfor %}

{% for table in tables %}<h2>{{ table.title }}</h2>
{% if table.rows %}
<div class="scroll"><table class="numbers">
<thead><tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for method, cells in table.rows %}<tr{% if method == "learned" %} class="learned"{% endif %}>
{%- for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
<p class="quiet">Lower is better; <em>x dense</em> is the ratio to the dense model's perplexity on
the same text.
{% if table.distances %}Beside the dense model: {{ table.distances }}. {% endif %}
{% if table.protocol %}Protocol: {{ table.protocol }}.
{%- else %}The protocol was not recorded.{% endif %}</p>
{% if table.stages %}<p class="quiet">Seconds by stage: {{ table.stages }}.</p>{% endif %}
{% else %}<p class="missing">Not there yet: the verb evaluate writes it.</p>{% endif %}
{% endfor %}

{% for table, pictures in others %}<h2>{{ table.title }}</h2>
{{ numbers(table) }}{{ shown(pictures) }}{% endfor %}

{% for section, pictures in sections %}<h2>{{ section }}</h2>
{{ shown(pictures) }}{% endfor %}

<h2>Mask files</h2>
{% for mask in masks %}<details{% if mask.method == "learned" %} open{% endif %}>
<summary><strong>{{ mask.label }}</strong>
<span class="quiet">{{ mask.file }}, {{ mask.size }}</span></summary>
<div class="scroll"><table>
{%- for key, value in mask.provenance.items() %}<tr><th>{{ key }}</th>
<td class="value">{{ value }}</td></tr>
{% endfor %}</table></div></details>
{% else %}<p class="missing">Not there yet: the verbs prune and learn write them.</p>{% endfor %}

<h2>Made with</h2>
{% if versions %}<table>
{%- for name, value in versions.items() %}<tr><th>{{ name }}</th>
<td class="value">{{ value }}</td></tr>
{% endfor %}</table>
{% else %}<p class="missing">Versions: not there yet. The verb learn writes them.</p>{% endif %}
<p>Seeds: {% for name, value in seeds.items() %}{{ name }} = {{ value }}
{%- if not loop.last %}, {% endif %}{% endfor %}</p>
<details><summary>Settings, as resolved</summary><pre>{{ settings }}</pre></details>
</main>
</body>
</html>
"""
)

COMPARISON = (
    _HEAD
    + """<p class="quiet">{{ subtitle }}</p>
{% for sentence in said %}<p class="missing">{{ sentence }}</p>
{% endfor %}
{% for table, pictures in sections %}<h2>{{ table.title }}</h2>
{{ numbers(table) }}{{ shown(pictures) }}{% endfor %}
</main>
</body>
</html>
"""
)
