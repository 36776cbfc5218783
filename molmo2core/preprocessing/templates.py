"""Our own wordings of every kind of request, and how one is filled in.

A family is a tuple of templates with the same fields; the first one is what evaluation asks.  Families and their sizes
follow data.md 5.3.  Video families are the image families with another noun.

A filled template comes in *pieces*, which are tokenised one by one.  Pieces meet before a space or after a line break,
where the splitters of byte-level tokenizers (Qwen's, OLMo's) cut anyway: the ids are those of the whole text, while
the longest draw can be bounded piece by piece (branch_lengths.py).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

Pieces = tuple[str, ...]
Family = tuple[str, ...]
Fields = Mapping[str, str | Pieces]
"""A value in pieces is one whose own parts are tokenised one by one."""

_FIELD = re.compile(r"\{(\w+)\}")
_CUT = re.compile(r"(?= )|(?<=\n)(?!\n)")


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A piece of a template: a field and what touches it."""

    before: str
    name: str
    after: str

    def filled(self, value: str | Pieces) -> Pieces:
        """The pieces that `value` makes of it; none of them empty."""
        first, *others = (value,) if isinstance(value, str) else value
        pieces = [self.before + first, *others]
        pieces[-1] += self.after
        return tuple(piece for piece in pieces if piece)


def fill(template: str, fields: Fields) -> Pieces:
    """The pieces of `template` with its fields filled in."""
    pieces: list[str] = []
    for part in cut(template):
        pieces += (part,) if isinstance(part, str) else part.filled(fields[part.name])
    return tuple(pieces)


@functools.cache
def cut(template: str) -> tuple[str | Slot, ...]:
    """A template in pieces: its slots, and the texts between them."""
    parts: list[str | Slot] = []
    for text in filter(None, _CUT.split(template)):
        field = _FIELD.search(text)
        if field:
            parts.append(Slot(before=text[: field.start()], name=field[1], after=text[field.end() :]))
        elif parts and isinstance(parts[-1], str):
            parts[-1] += text
        else:
            parts.append(text)
    return tuple(parts)


def _of_video(family: Family) -> Family:
    return tuple(re.sub(r"\b(?:image|picture|photo)\b", "video", template) for template in family)


def _first(templates: Family, family: Family) -> Family:
    """`templates`, then what `family` has besides."""
    return templates + tuple(template for template in family if template not in templates)


QUESTION: Family = ("{question}",)
LABEL: Family = ("{label}",)
NOTHING: Family = ("",)

LONG_CAPTION: Family = (
    "Describe this image.",
    "What does this image show? Give every detail.",
    "Write a full description of the picture.",
    "Describe this photo as fully as you can.",
    "Tell me everything that can be seen in this image.",
    "Give a thorough account of what this picture contains.",
    "Please write a detailed caption for this image.",
    "I cannot see this photo. Describe it to me in depth.",
    "What is in this picture? Leave nothing out.",
    "Put this image into words, down to the small things.",
    "Describe the scene, the objects and how they are arranged in this image.",
    "Write several sentences about everything shown in this photo.",
    "Walk me through this picture from front to back.",
    "Produce a long caption for this image.",
    "Explain in detail what this photo shows.",
    "How would you describe this image to someone who is not looking at it? Be complete.",
    "Look closely at this picture and report all that you notice.",
    "Give me a rich, exact description of this image.",
    "Describe colours, shapes, texts and actions in this photo.",
    "An extensive description of this picture, please.",
    "Say in as much detail as possible what this image depicts.",
    "Describe this picture so that an artist could draw it again.",
    "detailed caption of this image",
)
SHORT_CAPTION: Family = (
    "Describe this image in one sentence.",
    "Give this picture a short caption.",
    "Sum up this photo briefly.",
    "What does this image show, in a few words?",
    "Write a brief caption for this picture.",
    "One short sentence about this photo, please.",
    "Caption this image concisely.",
    "In brief: what is this picture of?",
    "Name the main content of this image in a sentence.",
    "Give me the gist of this photo.",
    "short caption of this image",
)
TRANSCRIPT: Family = (
    "Describe this image as a person would aloud.",
    "Talk about this picture as if you were speaking to somebody.",
    "What would someone say who describes this photo off the cuff?",
    "Give a spoken description of this image.",
    "Say in the words of everyday speech what this picture shows.",
)
VIDEO_LONG_CAPTION = _first(
    ("Describe this video.", "What happens in this video? Tell it in full.", "Write a full description of the clip."),
    _of_video(LONG_CAPTION),
)
VIDEO_SHORT_CAPTION = _of_video(SHORT_CAPTION)
VIDEO_TRANSCRIPT = _of_video(TRANSCRIPT)
MOTION_CAPTION: Family = (
    "Describe how things move in this video.",
    "What motions can be seen in this video?",
    "Tell me about every movement in this clip.",
    "How do people and objects move here?",
    "Describe the motion in this video, of the camera too.",
    "Report who or what moves, and in which way.",
    "Focus on movement: what takes place in this video?",
    "Write a caption about the motion in this clip.",
    "Which movements happen, and in what order?",
    "Give a detailed account of all motion in this video.",
)
OBJECT_CAPTION: Family = (
    "Describe {label} in this video.",
    "What does {label} do in this video?",
    "Tell me about {label} from beginning to end.",
    "Follow {label} and describe what happens to it.",
    "Write a caption about {label} alone.",
    "How does {label} look and behave in this clip?",
    "Give a detailed description of {label} over the whole video.",
    "Attend to {label} only. What can you report?",
    "What can be said of {label} in this clip?",
    "Describe appearance and actions of {label} here.",
)
CLIP_CAPTION: Family = (
    "Describe what happens from {start} to {end}.",
    "What can be seen between {start} and {end}?",
    "Write a caption for the part from {start} to {end}.",
    "Tell me about the video between {start} and {end}.",
    "Describe the segment that starts at {start} and ends at {end}.",
    "What goes on from {start} until {end}?",
    "Give a detailed account of the clip from {start} to {end}.",
    "Look at {start} to {end} only. What does it show?",
    "Sum up in detail what takes place between {start} and {end}.",
    "Caption the section between {start} and {end}.",
    "From {start} to {end}, what is happening?",
    "Which events lie between {start} and {end}?",
    "Report everything that is shown from {start} to {end}.",
    "Describe the scene from {start} through {end}.",
    "What does the viewer see between {start} and {end}?",
    "Explain what takes place in the video from {start} to {end}.",
    "I jumped to {start} and stopped at {end}. What did I watch?",
    "Between {start} and {end}, who does what?",
    "Put the part from {start} to {end} into words.",
    "caption for {start} to {end}",
)
FRAME_CAPTION: Family = (
    "Describe the frame at {time}.",
    "What can be seen at {time}?",
    "Write a caption for the moment at {time}.",
    "What does the video show at {time}?",
    "Pause at {time} and describe what is there.",
    "Tell me in detail what the picture at {time} shows.",
    "At {time}, what is on screen?",
    "Give a detailed description of the still at {time}.",
    "Which things are visible at {time}?",
    "Stop the video at {time}. What do you see?",
    "Describe the instant {time} as if it were a photo.",
    "caption for the frame at {time}",
)
CLIP_TRANSCRIPT: Family = (
    "Describe the part from {start} to {end} as a person would aloud.",
    "What would someone say about the video between {start} and {end}?",
    "Give a spoken description of {start} to {end}.",
    "Talk me through what happens from {start} until {end}.",
    "Say in everyday speech what is shown between {start} and {end}.",
)

SHORT_ANSWER: Family = (
    "{question}",
    "{question} Answer in a few words.",
    "{question} Keep it short.",
    "{question} Give a brief answer.",
    "{question}\nReply with a word or a short phrase.",
    "{question}\nShort answer:",
    "Answer briefly: {question}",
    "In a few words: {question}",
    "Watch the video and answer in short. {question}",
    "Question: {question}\nAnswer with a short phrase.",
    "{question} No explanation, only the answer.",
    "{question}\nSay it as shortly as you can.",
    "Give a short reply to this question. {question}",
    "{question} One word or phrase will do.",
    "Q: {question}\nA (short):",
)
REASONING: Family = ("{question}\nThink it through first, then finish with your answer.",)
WITHOUT_POINTING: Family = (
    "Do not point. {question}",
    "Without pointing: {question}",
    "No points, please. {question}",
    "Answer in text only. {question}",
    "{question} Do not point at anything.",
    "{question} Just tell me, without pointing.",
    "I need no points. {question}",
    "Please answer without marking anything: {question}",
    "{question} (no points)",
    "Words only, no coordinates: {question}",
    "{question} Leave out the points.",
    "{question} Give no coordinates.",
    "There is no need to point here. {question}",
    "{question} Skip the pointing.",
    "Use text instead of points: {question}",
    "{question} Reply in plain words, with no points.",
)

POINTING: Family = (
    "Point to {label}.",
    "Where is {label}? Point to each one.",
    "Show me every {label} with points.",
    "Mark {label} in the image.",
    "Point to {label}",
    "point to {label}",
    "Please point at {label}.",
    "Can you point to {label}?",
    "Could you point out {label} in this image?",
    "Find {label}.",
    "Find every {label} and point to it.",
    "Find {label} in the picture and mark each with a point.",
    "Locate {label}.",
    "Locate all {label} in this photo.",
    "Locate {label} with points.",
    "Where can I see {label}?",
    "Where do you see {label} in this image? Answer with points.",
    "Where are {label}?",
    "In which places is {label}? Give points.",
    "Show me {label}.",
    "Show where {label} is in the photo.",
    "Indicate {label}.",
    "Indicate every {label} with a point.",
    "Give the points of {label}.",
    "Give me a point for each {label}.",
    "Put a point on {label}.",
    "Put one point on every {label} in the image.",
    "Place a dot on each {label}.",
    "Mark each {label}.",
    "Mark where {label} can be seen.",
    "Pick out {label} in the picture.",
    "Pinpoint {label}.",
    "Pinpoint every {label} that you can see.",
    "Identify the position of {label}.",
    "List the positions of {label} as points.",
    "Tell me where {label} is by pointing.",
    "Help me find {label}: point to it.",
    "I am looking for {label}. Point it out.",
    "If there is {label} in this image, point to it.",
    "Is there any {label}? Then point to it.",
    "Use points to show {label}.",
    "pointing: {label}",
)
POINT_COUNT: Family = (
    "How many {label} are there?",
    "Count {label}.",
    "Give the number of {label} in the image.",
    "How many {label} can you see?",
    "How many {label} are in this image?",
    "How many {label} are in the picture?",
    "How many {label} does this photo show?",
    "how many {label}",
    "How many {label}?",
    "Count the {label}.",
    "Count every {label}.",
    "Count all {label} that can be seen.",
    "Count {label} in this image.",
    "Please count {label}.",
    "Can you count {label} for me?",
    "Could you tell me how many {label} there are?",
    "What is the number of {label}?",
    "What is the total of {label} in this picture?",
    "What is the count of {label}?",
    "Tell me the number of {label}.",
    "Tell me how many {label} you find.",
    "State how many {label} there are.",
    "Find {label} and count.",
    "Find every {label} and give the total.",
    "Point to {label} and count.",
    "Point to each {label}, then say how many there are.",
    "Point at every {label} and tell me the number.",
    "Mark all {label} and count them.",
    "Mark {label} with points and add them up.",
    "Locate {label} and state the total.",
    "Go through the image and count {label}.",
    "Look for {label}. How many are there?",
    "Is there more than one {label}? Count.",
    "Number of {label}?",
    "Number of {label} in this photo?",
    "Total number of {label}?",
    "I want to know how many {label} there are.",
    "I need the number of {label} in the picture.",
    "Work out how many {label} are visible.",
    "Determine the number of {label}.",
    "Give me a count of {label}.",
    "Give the total of {label}, with a point on each.",
    "Show and count {label}.",
    "Add up all {label} in this image.",
    "counting: {label}",
)
COUNT_THEN_POINT: Family = (
    "How many {label} are there? State the number first, then point.",
    "Count {label}, then point to each.",
    "Give the number of {label} and after it their points.",
    "First say how many {label} you see, then mark them.",
    "Tell me the total of {label} in this image before you point at them.",
    "Number of {label} first, points second.",
)
COUNT: Family = (
    "How many {label} are there? Reply with the number alone.",
    "Count {label} without pointing.",
    "Give only the number of {label} in the image.",
    "How many {label}? A number, nothing else.",
    "State the number of {label}; no points.",
    "Just the count of {label}, please.",
)

MULTI_POINTING: Family = (
    "Point to {label} in {images}.",
    "Where is {label} in {images}?",
    "Mark {label} in {images}.",
    "Find {label} in {images} and point to it.",
    "Show me {label} in {images} with points.",
    "Locate every {label} in {images}.",
    "Look at {images} and point to {label}.",
    "Give points for {label} in {images}.",
    "Put a point on each {label} in {images}.",
    "In {images}, point out {label}.",
    "Indicate where {label} is in {images}.",
)
MULTI_POINT_COUNT: Family = (
    "How many {label} are there in {images}?",
    "Count {label} in {images}.",
    "Give the number of {label} in {images}.",
    "Point to {label} in {images} and count.",
    "Count every {label} that {images} show.",
    "In {images}, how many {label} can you see?",
    "What is the total of {label} in {images}?",
    "Find {label} in {images} and add them up.",
    "Mark each {label} in {images} and state the number.",
    "Tell me how many {label} there are in {images}.",
    "Look through {images} and count {label}.",
    "Number of {label} in {images}?",
    "Please count {label} over {images}.",
    "Taken together, how many {label} do {images} contain?",
)
MULTI_COUNT_THEN_POINT: Family = (
    "How many {label} are there in {images}? State the number first, then point.",
    "Count {label} in {images}, then point to each.",
    "Give the number of {label} in {images} and after it their points.",
    "First say how many {label} you see in {images}, then mark them.",
    "Total of {label} in {images}, followed by points.",
    "In {images}, count {label} and only then point.",
    "Number first, points second: {label} in {images}.",
    "Tell me how many {label} {images} show before you point at them.",
    "Say the count of {label} for {images}, then locate each.",
)
MULTI_COUNT: Family = (
    "How many {label} are there in {images}? Reply with the number alone.",
    "Count {label} in {images} without pointing.",
    "Give only the number of {label} in {images}.",
    "In {images}, how many {label}? A number, nothing else.",
    "State the number of {label} in {images}; no points.",
    "Just the count of {label} in {images}, please.",
    "Only the total: {label} in {images}.",
    "What number of {label} do {images} show? Do not point.",
    "Tell me the count of {label} in {images} as a number.",
)
ALL_IMAGES = "all images"

VIDEO_POINTING = _first(
    (
        "Point to {label} in the video.",
        "Where and when is {label} seen?",
        "Mark {label} in the video with times.",
    ),
    _of_video(POINTING),
)
VIDEO_POINT_COUNT = _of_video(POINT_COUNT)
VIDEO_COUNT_THEN_POINT = _of_video(COUNT_THEN_POINT)
VIDEO_COUNT = _of_video(COUNT)

TRACK: Family = (
    "Track {label} at {fps} fps.",
    "Follow {label} through the video at {fps} fps.",
    "Where is {label} over time? Use {fps} fps.",
    "Track {label} with {fps} positions per second.",
    "At {fps} fps, track every {label}.",
    "Give the tracks of {label}, sampled at {fps} fps.",
    "Follow each {label} from beginning to end. Sample at {fps} fps.",
    "Show the paths of {label} at {fps} frames per second.",
    "Keep track of {label} at a rate of {fps} fps.",
    "Point to {label} {fps} times a second.",
)
TRACK_AT_DEFAULT_FPS: Family = (
    "Track {label}.",
    "Follow {label} through the video.",
    "Where is {label} over time?",
    "Track every {label} in this clip.",
    "Give the tracks of {label}.",
    "Follow each {label} from beginning to end.",
    "Show the paths of {label}.",
    "Keep track of {label}.",
)
DEFAULT_FPS = 2.0
"""What a tracking prompt without a number means (data.md 6.5)."""
GROUND: Family = (
    "Point to {label} where it is first and last seen.",
    "When does {label} appear and disappear? Point to both.",
    "Mark the first and the last appearance of {label}.",
    "Where does {label} begin and end in this video?",
    "Give start and end point of each {label}.",
    "Show {label} at the first and at the last moment it is visible.",
    "Find when and where {label} enters and when and where it leaves.",
)
SINGLE_POINT_TRACK: Family = (
    "Track the object at {point} at {fps} fps.",
    "Follow what is shown by {point} at {fps} fps.",
    "Start from {point} and track it at {fps} fps.",
    "Where does the object at {point} go? Use {fps} fps.",
    "Given {point}, give its later positions at {fps} fps.",
    "At {fps} fps, keep following {point}.",
    "This is the object: {point} Track it from here at {fps} fps.",
    "Continue the track that begins with {point} at {fps} fps.",
    "Take {point} as the start and follow it with {fps} positions per second.",
    "Show the path of {point} from then on, sampled at {fps} fps.",
    "Beginning at {point} where is it next? Answer at {fps} fps.",
    "Stay on the object marked by {point} at a rate of {fps} fps.",
)
