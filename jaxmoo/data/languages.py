"""English names of language codes, for tables and plots."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LANGUAGE_NAMES: dict[str, str] = {
    "am": "Amharic",
    "ar": "Arabic",
    "bg": "Bulgarian",
    "bn": "Bengali",
    "ca": "Catalan",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "et": "Estonian",
    "eu": "Basque",
    "fa": "Persian",
    "fi": "Finnish",
    "fr": "French",
    "gu": "Gujarati",
    "ha": "Hausa",
    "he": "Hebrew",
    "hi": "Hindi",
    "hi-Latn": "Hinglish",
    "hr": "Croatian",
    "ht": "Haitian Creole",
    "hu": "Hungarian",
    "hy": "Armenian",
    "id": "Indonesian",
    "is": "Icelandic",
    "it": "Italian",
    "ja": "Japanese",
    "ka": "Georgian",
    "kk": "Kazakh",
    "km": "Khmer",
    "kn": "Kannada",
    "ko": "Korean",
    "lt": "Lithuanian",
    "lv": "Latvian",
    "ml": "Malayalam",
    "mr": "Marathi",
    "ms": "Malay",
    "my": "Burmese",
    "ne": "Nepali",
    "nl": "Dutch",
    "no": "Norwegian",
    "or": "Odia",
    "pa": "Punjabi",
    "pl": "Polish",
    "pt": "Portuguese",
    "qu": "Quechua",
    "ro": "Romanian",
    "ru": "Russian",
    "si": "Sinhala",
    "sk": "Slovak",
    "sl": "Slovenian",
    "sq": "Albanian",
    "sr": "Serbian",
    "sv": "Swedish",
    "sw": "Swahili",
    "ta": "Tamil",
    "te": "Telugu",
    "th": "Thai",
    "tl": "Tagalog",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "ur": "Urdu",
    "uz": "Uzbek",
    "vi": "Vietnamese",
    "yo": "Yoruba",
    "zh": "Chinese",
    "zh-Hant": "Chinese (traditional)",
    "zu": "Zulu",
}

# Countries' codes that are often written for their languages.
_COUNTRIES = {
    "br": "pt",
    "cn": "zh",
    "cz": "cs",
    "dk": "da",
    "gb": "en",
    "gr": "el",
    "ir": "fa",
    "jp": "ja",
    "kr": "ko",
    "se": "sv",
    "ua": "uk",
    "us": "en",
}


def language_name(code: str) -> str:
    """Return a language's English name.

    Args:
      code: an ISO 639-1 code, with a script where needed (``"zh-Hant"``).

    Returns:
      The name, or the code itself when it is not in `LANGUAGE_NAMES`.

    Example:
      >>> language_name("fa"), language_name("tlh")
      ('Persian', 'tlh')
    """
    return LANGUAGE_NAMES.get(code, code)


def nearest_language(name: str, available: Iterable[str]) -> str:
    """Return a hint naming the available language that was probably meant.

    Args:
      name: what was given: a misspelt code, a country's code or a language's English name.
      available: the codes that would have been right.

    Returns:
      ``" Did you mean 'x' (X)?"``, or the empty string when nothing is near.

    Example:
      >>> nearest_language("jp", ["ja", "ko"])
      " Did you mean 'ja' (Japanese)?"
      >>> nearest_language("portugese", ["pt", "es"])
      " Did you mean 'pt' (Portuguese)?"
      >>> nearest_language("eng_Latm", ["eng_Latn", "por_Latn"])
      " Did you mean 'eng_Latn'?"
      >>> nearest_language("tlh", ["ja", "ko"])
      ''
    """
    available = sorted(available)
    by_name = {language_name(code).lower(): code for code in available}
    near = [code for code in [_COUNTRIES.get(name.lower())] if code in available]
    near += [by_name[n] for n in difflib.get_close_matches(name.lower(), by_name, 1, 0.75)]
    # Two codes of two letters with one in common are half alike.
    near += difflib.get_close_matches(name, available, 1, 0.5)
    if not near:
        return ""
    full = language_name(near[0])
    return f" Did you mean '{near[0]}'" + (f" ({full})?" if full != near[0] else "?")
