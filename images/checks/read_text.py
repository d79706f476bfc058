"""In a container: the OCR engine and its models read a picture without network."""

import sys

from PIL import Image, ImageDraw, ImageFont

from vlmflow.curation.ocr_engine import Reader

picture = Image.new("RGB", (320, 96), "white")
ImageDraw.Draw(picture).text((24, 20), "STOP 42", fill="black", font=ImageFont.load_default(48))
text, lines = Reader().read(picture)
print(repr(text), lines)
sys.exit(0 if text.replace(" ", "") == "STOP42" else f"read {text!r} instead of 'STOP 42'")
