# The damaged photos of gallery.md: python3 docs/gallery/damage.py SAMPLES OUT
import io, sys
from pathlib import Path
import numpy as np
from PIL import Image, ImageFilter

samples, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)

def photo(name):
    return Image.open(samples / f"{name}.png").convert("RGB")

def save(name, values):
    Image.fromarray((np.clip(values, 0, 1) * 255).round().astype(np.uint8)).save(out / f"{name}.png")

def values(image):
    return np.asarray(image, dtype=np.float32) / 255

chelsea, coffee, astronaut = photo("chelsea"), photo("coffee"), photo("astronaut")
random = np.random.default_rng(1)
save("noisy", values(chelsea) + random.normal(0, 0.1, values(chelsea).shape))
save("dark", (values(coffee) ** 2.2 * 0.2) ** (1 / 2.2) + random.normal(0, 0.01, values(coffee).shape))
save("cast", values(coffee) * [0.62, 0.85, 1.0])
save("flat", 0.5 + 0.4 * (values(astronaut) - 0.5))
astronaut.filter(ImageFilter.GaussianBlur(1.5)).save(out / "blurred.png")
astronaut.convert("L").convert("RGB").save(out / "gray.png")
buffer = io.BytesIO()
chelsea.save(buffer, "JPEG", quality=15)
Image.open(buffer).save(out / "compressed.png")
small = chelsea.resize((chelsea.width // 2, chelsea.height // 2), Image.BOX)
small.resize(chelsea.size, Image.NEAREST).save(out / "pixels.png")
