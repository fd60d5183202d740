"""Sentences in many languages and scripts, written for the tests.

Each entry: language, script, sentences. They are joined as the language does: with a space, or with nothing.
"""

from __future__ import annotations

from typing import NamedTuple


class Language(NamedTuple):
    name: str
    script: str
    sentences: list[str]
    joined_by: str = " "


LANGUAGES = [
    Language("English", "Latin", ["The river is wide here.", "We cross it by boat.", "Where do you live?"]),
    Language("French", "Latin", ["La rivière est large ici.", "Nous la traversons l'été.", "Où habitez-vous ?"]),
    Language("German", "Latin", ["Der Fluss ist hier breit.", "Wir überqueren ihn früh.", "Wo wohnst du?"]),
    Language("Spanish", "Latin", ["El río es ancho aquí.", "Mañana lo cruzamos.", "El niño duerme."]),
    Language("Polish", "Latin", ["Rzeka jest tu szeroka.", "Płyniemy łodzią.", "Gdzie mieszkasz?"]),
    Language("Turkish", "Latin", ["Nehir burada geniş.", "Onu kayıkla geçiyoruz.", "Nerede yaşıyorsun?"]),
    Language("Vietnamese", "Latin", ["Con sông ở đây rất rộng.", "Chúng tôi đi thuyền qua.", "Bạn sống ở đâu?"]),
    Language("Swahili", "Latin", ["Mto ni mpana hapa.", "Tunavuka kwa mashua.", "Unaishi wapi?"]),
    Language("lower-case English", "Latin", ["the river is wide.", "we cross it by boat…", "where do you live?"]),
    Language("Russian", "Cyrillic", ["Река здесь широкая.", "Мой брат живёт за рекой.", "Где ты живёшь?"]),
    Language("Ukrainian", "Cyrillic", ["Річка тут широка.", "Її переходять човном.", "Де ти живеш?"]),
    Language("Greek", "Greek", ["Το ποτάμι είναι πλατύ.", "Πού μένεις;", "Εγώ μένω κοντά."]),
    Language("Armenian", "Armenian", ["Գետը լայն է այստեղ։", "Մենք անցնում ենք նավով։", "Ես ապրում եմ մոտ։"]),
    Language("Georgian", "Georgian", ["მდინარე აქ ფართოა.", "ჩვენ ნავით გადავდივართ.", "სად ცხოვრობ?"]),
    Language("Hebrew", "Hebrew", ["הנהר רחב כאן.", "אנחנו חוצים אותו בסירה.", "איפה אתה גר?"]),
    Language("Arabic", "Arabic", ["النهر واسع هنا.", "نعبره بالقارب كل يوم.", "أين تسكن؟"]),
    Language("Persian", "Arabic", ["رودخانه اینجا پهن است.", "ما با قایق می‌رویم.", "کجا زندگی می‌کنی؟"]),
    Language("Urdu", "Arabic", ["دریا یہاں چوڑا ہے۔", "ہم کشتی سے پار کرتے ہیں۔", "آپ کہاں رہتے ہیں؟"]),
    Language("Hindi", "Devanagari", ["नदी यहाँ चौड़ी है।", "घर में दो कमरे हैं।", "तुम कहाँ रहते हो?"]),
    Language("Marathi", "Devanagari", ["नदी इथे रुंद आहे.", "आम्ही होडीने जातो.", "तू कुठे राहतोस?"]),
    Language("Bengali", "Bengali", ["নদী এখানে চওড়া।", "আমরা নৌকায় পার হই।", "তুমি কোথায় থাকো?"]),
    Language("Punjabi", "Gurmukhi", ["ਨਦੀ ਇੱਥੇ ਚੌੜੀ ਹੈ।", "ਅਸੀਂ ਕਿਸ਼ਤੀ ਵਿੱਚ ਜਾਂਦੇ ਹਾਂ।", "ਤੂੰ ਕਿੱਥੇ ਰਹਿੰਦਾ ਹੈਂ?"]),
    Language("Gujarati", "Gujarati", ["નદી અહીં પહોળી છે.", "અમે હોડીમાં જઈએ છીએ.", "તમે ક્યાં રહો છો?"]),
    Language("Tamil", "Tamil", ["ஆறு இங்கே அகலமானது.", "நாங்கள் படகில் செல்கிறோம்.", "நீ எங்கே வாழ்கிறாய்?"]),
    Language("Telugu", "Telugu", ["నది ఇక్కడ వెడల్పుగా ఉంది.", "మేము పడవలో వెళ్తాము.", "నువ్వు ఎక్కడ ఉంటావు?"]),
    Language("Kannada", "Kannada", ["ನದಿ ಇಲ್ಲಿ ಅಗಲವಾಗಿದೆ.", "ನಾವು ದೋಣಿಯಲ್ಲಿ ಹೋಗುತ್ತೇವೆ.", "ನೀನು ಎಲ್ಲಿ ಇರುತ್ತೀಯ?"]),
    Language("Malayalam", "Malayalam", ["നദി ഇവിടെ വീതിയുള്ളതാണ്.", "ഞങ്ങൾ തോണിയിൽ പോകുന്നു.", "നീ എവിടെ താമസിക്കുന്നു?"]),
    Language("Sinhala", "Sinhala", ["ගඟ මෙතන පළලයි.", "අපි ඔරුවෙන් යනවා.", "ඔබ කොහේද ඉන්නේ?"]),
    Language("Thai", "Thai", ["แม่น้ำที่นี่กว้างมาก", "เราข้ามด้วยเรือทุกวัน", "คุณอยู่ที่ไหน"]),
    Language("Lao", "Lao", ["ແມ່ນ້ຳຢູ່ນີ້ກວ້າງ", "ພວກເຮົາຂ້າມດ້ວຍເຮືອ", "ເຈົ້າຢູ່ໃສ"]),
    Language("Khmer", "Khmer", ["ទន្លេនៅទីនេះធំ។", "យើងឆ្លងដោយទូក។", "ខ្ញុំរស់នៅជិត។"]),
    Language("Burmese", "Myanmar", ["မြစ်သည်ဤနေရာတွင်ကျယ်သည်။", "ကျွန်ုပ်တို့လှေဖြင့်ကူးသည်။", "သင်ဘယ်မှာနေသလဲ။"], ""),
    Language("Tibetan", "Tibetan", ["གཙང་པོ་འདི་ཆེན་པོ་རེད།", "ང་ཚོ་གྲུ་ནས་འགྲོ།", "ཁྱེད་རང་ག་པར་བཞུགས།"]),
    Language("Amharic", "Ethiopic", ["ወንዙ እዚህ ሰፊ ነው።", "በጀልባ እንሻገራለን።", "የት ትኖራለህ?"]),
    Language("Chinese", "Han", ["这里的河很宽。", "我们每天坐船过河。", "你住在哪里？"], ""),
    Language(
        "Japanese",
        "Kana and Han",
        ["ここの川は広いです。", "私たちは船でわたります。", "どこに住みますか？"],
        "",
    ),
    Language("Korean", "Hangul", ["이곳의 강은 넓습니다.", "우리는 배를 타고 건넙니다.", "어디에 삽니까?"]),
]
