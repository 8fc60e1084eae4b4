"""Texts to calibrate text towers on, where the user gives none: what people type for CLIP and for image generation.

Composed from lists of words, so that a small file gives many texts of every length: from one word to more than a
context of 77 tokens, in many scripts, with the marks, numbers and markup that real input has. Calibration measures how
large activations become, so variety counts for more than likelihood.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["prompts"]

_THINGS = (
    *("cat", "golden retriever", "zebra", "hummingbird", "goldfish", "beetle", "oak tree", "sunflower", "mushroom"),
    *("bicycle", "fire engine", "sailing boat", "airliner", "tractor", "lighthouse", "church", "bridge", "castle"),
    *("teapot", "violin", "laptop", "wrist watch", "umbrella", "sofa", "pair of scissors", "football", "snowman"),
    *("pizza", "bowl of ramen", "wedding cake", "strawberry", "espresso", "firefighter", "ballerina", "astronaut"),
    *("volcano", "waterfall", "desert", "street market", "X-ray of a hand", "satellite image of a harbour"),
)
_CLASS_FRAMES = (
    *("a photo of a {}", "a blurry photo of one {}", "a drawing of the {}", "a close-up of a {}.", "{}", "art of a {}"),
    *("a black and white photo of the {}", "a {} in a video game", "itap of my {}", "a photo of many {}s", "no {}"),
    *("a plastic {}", "the {} is hard to see", "a tattoo of a {}", "a low resolution picture of a {}"),
    *("some {}, maybe", "a {} made of glass", "is there a {} in this picture?", "not a {} but something like it"),
)
_WHO = (
    *("an old man", "two children", "a woman in a red coat", "a brown dog", "three tourists", "a street musician"),
    *("a boy with a backpack", "the goalkeeper", "a flock of geese", "a nurse", "several cyclists"),
)
_DOES = (
    *("waiting", "sitting down to rest", "playing happily", "looking at the camera", "walking slowly", "eating lunch"),
    *("taking a photograph", "arguing loudly", "sleeping", "carrying a large box", "standing alone", "dancing"),
    *("waving",),
)
_WHERE = (
    *("on a wooden bench", "beside the river", "in front of a bakery", "under a grey sky", "at the train station"),
    *("in a crowded square", "near a broken fence", "on the beach at sunset", "inside a bright kitchen"),
    *("across from the museum", "in deep snow", "on the roof of a tall building", "by the window", "in the rain"),
    *("between parked cars", "at the edge of a forest", "behind the counter"),
)
_ALSO = (
    *("while a small crowd is watching from the other side", "and nobody else can be seen"),
    *("with mountains far behind", "as the evening light falls through the trees"),
    *("and a yellow taxi drives past in the background", "holding a cup of coffee in one hand"),
    *("next to a sign that reads “closed until Monday”",),
)
_SEARCHES = (
    *("red running shoes", "minimalist logo owl", "cheap desk lamp black metal", "mid-century chair"),
    *("floor plan 80 m2", "vintage poster 1960s travel", "people shaking hands office", "error screen"),
    *("how to tie a bow tie", "sad clown", "kitchen ideas small apartment", "dog wearing sunglasses"),
    *("receipt restaurant", "map of the underground", "wallpaper 4k dark forest", "birthday invitation template"),
    *("moss texture seamless", "graph going up", "meme"),
)
_STYLES = (
    *("oil painting", "studio lighting", "35mm film grain", "highly detailed", "cinematic composition", "golden hour"),
    *("watercolour on rough paper", "isometric", "volumetric fog", "soft focus", "pixel art", "wide angle", "8k"),
    *("bokeh", "muted colours", "dramatic shadows", "art nouveau ornament", "octane render", "symmetrical"),
    *("concept art", "trending", "ultra realistic skin texture", "line drawing", "neon reflections on wet asphalt"),
    *("(masterpiece:1.2)", "by an unknown master", "macro shot", "pastel palette", "low poly", "sharp eyes"),
    *("award winning", "from above"),
)
_LANGUAGES = (
    *("ein Foto von einer schlafenden Katze", "Straßenbahn im Regen, München", "zwei Äpfel auf dem Küchentisch"),
    *("une photo d'un chat noir", "la tour au coucher du soleil, très loin", "des élèves à l'école"),
    *("una foto de un perro pequeño", "niños jugando al fútbol en la calle", "¿dónde está la estación?"),
    *("uma praia cheia de gente no verão", "um pão quente e um café", "la cucina della nonna"),
    *("un vecchio ponte di pietra", "een fiets tegen een muur", "en röd stuga vid sjön", "en gammel båt på fjorden"),
    *("lumisade ja hiljainen metsä", "zdjęcie żółtego samochodu", "stary zamek nad rzeką", "kočka spí na gauči"),
    *("egy piros alma a fán", "o casă în munți", "kırmızı bir bisiklet", "İstanbul'da vapur", "một con mèo trắng"),
    *("bữa sáng trên bàn", "seekor burung di dahan", "mtoto anacheza mpira", "isang lumang simbahan"),
    *("ljósmynd af fossi", "фотография рыжей кошки", "старый трамвай зимой", "дівчина з парасолькою"),
    *("жълто цвете на прозореца", "μια φωτογραφία ενός λευκού σπιτιού", "το λιμάνι τη νύχτα", "צילום של חתול ישן"),
    *("שוק ביום שישי", "صورة قطة نائمة", "سوق قديم في المدينة", "عکس یک گل سرخ", "ایک پرانا پل"),
    *("सोती हुई बिल्ली की तस्वीर", "बाज़ार में लोग", "একটি লাল নৌকা", "நாய் ஓடுகிறது", "ఒక పాత చెట్టు", "ಹಳೆಯ ಮನೆ"),
    *("പുഴയും പാലവും", "ภาพถ่ายของแมวสีขาว", "ตลาดน้ำตอนเช้า", "ຮູບຖ່າຍຂອງວັດ", "រូបថតប្រាសាទ", "ကြောင်ဖြူတစ်ကောင်"),
    *("ශ්‍රී පාදය", "ਲਾਲ ਟਰੈਕਟਰ", "一只正在睡觉的猫", "城市夜景,高楼和车流", "山水畫,雲霧", "眠っている猫の写真"),
    *("雨の日のバス停", "カラフルなアイスクリーム", "잠자는 고양이 사진", "비 오는 거리의 우산", "მძინარე კატა"),
    *("ძველი ეკლესია", "քնած կատու", "የድመት ፎቶ", "གངས་རི།"),
)
_ODD = (
    *("", ".", "?!?!", "...", "A", "1", "42", "007", "3.14159", "-40 °C", "$1,299.99", "50% off!!!", "12:45 p.m."),
    *("2024-02-29", "+1 (555) 010-9999", "f/1.8, 1/250 s, ISO 400", "16:9", "№ 5", "x² + y² = r²", "∑ ∞ ≠ ≈ √2"),
    *("IMG_20240229_124501.jpg", "DSC00042.NEF", "photo (1) copy.png", "final_v2_FINAL.psd", "~/pictures/cat-01.webp"),
    *("C:\\Users\\me\\cat.bmp", "https://example.org/a/b?c=1&d=%20#top", "me@example.org", "#nofilter #cat @home"),
    *("<b>bold</b> &amp; <i>italic</i>", "&lt;div class=&quot;cat&quot;&gt;", "**markdown** [link](cat.png)"),
    *("\\frac{a}{b}", '{"prompt": "a cat", "steps": 20}', "SELECT * FROM cats;", "def cat(self): return None"),
    *("<|endoftext|>", "lora:x:0.8", "🐱", "😂😂😂", "a cat 🐈‍⬛ and a dog 🐕", "👩🏽‍🚀 on the 🌕", "🇯🇵 🇧🇷 🇰🇪"),
    *("❤️ love ❤️", "1️⃣ 2️⃣ 3️⃣", "(づ｡◕‿‿◕｡)づ", "¯\\_(ツ)_/¯", "A PHOTO OF A CAT", "STOP", "SALE ENDS TODAY"),
    *("McDonald O'Neil-Smith", "iPhone vs. eBook", "camelCase snake_case", "aaaaaaaaaaaaaaaaaaaaaaaa", "asdfghjkl"),
    *("xkcdqwv zrtpl", "antidisestablishmentarianism", "it's, we've, they'll", "   spaces   everywhere   "),
    *("tab\tand\nnew line", "cafe\u0301", "ﬁne ｗｉｄｅ", "“curly” ‘quotes’ – dash — …", "Ünïcödé", "𝓯𝓪𝓷𝓬𝔂"),
)


def prompts() -> tuple[str, ...]:
    """The 512 texts, none of them twice; the same on every platform."""
    return tuple(dict.fromkeys((*_classes(), *_captions(), *_generation(), *_SEARCHES, *_THINGS, *_LANGUAGES, *_ODD)))


def _classes() -> Iterator[str]:
    """Zero-shot prompts: every frame with a few things, and every thing in a few frames."""
    for number in range(116):
        # One more after each round, or lists whose lengths share a factor would always meet in the same pairs.
        yield _turn(_CLASS_FRAMES, number).format(_turn(_THINGS, number + number // len(_THINGS)))


def _captions() -> Iterator[str]:
    """Captions of 4 to 25 words: plain, then with a second half, then as sentences."""
    for number in range(112):
        who, does, where, also = (_turn(words, number) for words in (_WHO, _DOES, _WHERE, _ALSO))
        text = f"{who} {does} {where}" if number % 4 else f"{who} {where}"
        text = f"{text} {also}" if number % 2 else text
        yield f"{text[0].upper()}{text[1:]}." if number % 3 == 0 else text


def _generation() -> Iterator[str]:
    """Prompts for image generation: a subject and 1 to 30 wishes, so from a few tokens to far over a context of 77."""
    for number in range(96):
        subject = f"{_turn(_WHO, number)} {_turn(_WHERE, 3 * number)}" if number % 2 else f"a {_turn(_THINGS, number)}"
        wishes = [_turn(_STYLES, 5 * number + step) for step in range(1 + number * 30 // 96)]
        yield ", ".join([subject, *wishes])


def _turn(words: Sequence[str], number: int) -> str:
    return words[number % len(words)]
