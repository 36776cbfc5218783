"""The chat template of exported models, in Jinja as transformers renders it (model.md 6.1).

Own wording of the released semantics, which include one oddity kept on purpose: a space before the header of every
past assistant turn.  Training and single-turn inference never produce it; multi-turn inference through transformers
does, in released models as in ours, so that both can be compared token by token.
"""

from __future__ import annotations

UNPREFIXED_STYLES = (
    "point_count", "pointing", "cosyn_point", "user_qa", "long_caption", "short_caption", "video_long_caption",
    "video_short_caption", "video_point_track_per_frame", "video_point_track_start_end",
    "video_single_point_track_start_end", "video_transcript", "video_clip_caption_start_end",
    "video_clip_caption_start_end_in_seconds", "video_clip_transcript_start_end",
    "video_clip_transcript_start_end_in_seconds", "video_frame_caption_timestamp",
    "video_frame_caption_timestamp_in_seconds", "correction_qa", "text_sft", "video_point", "video_point_count",
    "video_count", "video_count_point", "multi_image_pointing", "multi_image_counting",
    "multi_image_point_then_count", "multi_image_count_then_point", "video_point_track_all_frames", "demo",
    "a_okvqa_mc", "ai2_diagram_no_letter", "ai2_diagram", "science_qa", "multi_image_mc", "multi_image_mc_exp",
    "mantis_instruct_mc", "video_multiple_choice", "video_multiple_choice_count_without_pointing",
    "video_multiple_choice_multiple_correct", "video_multiple_choice_w_subtitle",
)  # fmt: skip
"""Styles whose text stands without a `style: ` prefix."""

_HEAD = "{% set unprefixed = [" + ", ".join(f"'{style}'" for style in UNPREFIXED_STYLES) + "] %}"

# Visual placeholders come before any role header, wherever they stand in the messages.
_VISUAL = """
{%- set seen = namespace(images=0, videos=0) -%}
{%- for message in messages -%}
  {%- if message['content'] is not string -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
        {%- set seen.images = seen.images + 1 -%}
      {%- elif part['type'] == 'video' or 'video' in part or 'video_url' in part -%}
        {%- set seen.videos = seen.videos + 1 -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endfor -%}
{%- for number in range(1, seen.images + 1) -%}
  {{- 'Image ' ~ number if seen.images > 1 else '' -}}{{- '<|image|>' -}}
{%- endfor -%}
{{- '<|video|>' * seen.videos -}}
"""

_TURNS = """
{%- set turns = messages -%}
{%- if messages and messages[0]['role'] | lower == 'subtitle' -%}
  {{- messages[0]['content'] -}}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
  {%- set role = message['role'] | lower -%}
  {%- if role != ('user' if loop.index0 is even else 'assistant') -%}
    {{- raise_exception('roles must alternate user, assistant, user, ...; found ' ~ role) -}}
  {%- endif -%}
  {%- set words = namespace(parts=[]) -%}
  {%- if message['content'] is string -%}
    {%- set words.parts = [message['content']] -%}
  {%- else -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}
      {%- set style = part['style'] if 'style' in part else none -%}
      {%- set prefix = style ~ ': ' if style and style not in unprefixed else '' -%}
      {%- set words.parts = words.parts + [prefix ~ part['text']] -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if role == 'user' -%}
    {{- '<|im_end|>\\n' if not loop.first else '' -}}
    {{- '<|im_start|>user\\n' ~ words.parts | join(' ') ~ '<|im_end|>\\n' -}}
  {%- else -%}
    {{- ' <|im_start|>assistant\\n' ~ words.parts | join(' ') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


CHAT_TEMPLATE = _HEAD + _VISUAL + _TURNS.rstrip("\n")
"""Content of `chat_template.jinja`."""
