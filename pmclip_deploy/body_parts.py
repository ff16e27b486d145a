"""Parts of the body: words, Body Part Examined values and codes (PS3.16 annex L). Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from pmclip_deploy.vocabulary import MUSCULOSKELETAL, REGIONS


@dataclass(frozen=True)
class Part:
    """A body part as a file or a person names it."""

    label: str
    regions: tuple[str, ...]  # keys of REGIONS that it shows, all of them; empty where it is too wide or too vague for one
    words: tuple[str, ...]  # as people say it, lower case
    terms: tuple[str, ...]  # Body Part Examined (0018,0015), without blanks, "-", "_" and "/": PS3.16 Annex L, and what devices write
    codes: tuple[str, ...]  # of Anatomic Region Sequence (0008,2218): SNOMED CT, and SNOMED RT (SRT, SNM3, 99SDM)
    organs: tuple[str, ...]  # of the ten organ answers, the likeliest first


def _part(label: str, regions: str, words: str, terms: str, codes: str, organs: str | None = None) -> Part:
    names = tuple(regions.split())
    spoken = tuple(word.strip() for word in words.split(",")) if words else ()
    of_regions = tuple(dict.fromkeys(organ for name in names for organ in REGIONS[name].organs))
    return Part(label, names, spoken, tuple(terms.split()), tuple(codes.split()), (organs,) if organs else of_regions)


LUNG, HEART, GI, GU = "lung, mediastinum, pleura", "heart and great vessels", "gastrointestinal", "genitourinary"
VESSELS = "vascular and lymphatic"

PARTS = (
    # arm
    _part("hand", "hand", "hand, hands", "HAND HANDS LHAND RHAND", "85562004 T-D8700"),
    _part("wrist", "hand", "wrist, wrists, carpus, carpal, scaphoid", "WRIST WRISTS CARPUS SCAPHOID",
          "74670003 T-15460 8205005 T-D8600"),
    _part("finger", "hand", "finger, fingers, phalanx, digit", "FINGER FINGERS HANDFINGER", "7569003 T-D8800"),
    _part("thumb", "hand", "thumb", "THUMB", "76505004 T-D8810"),
    _part("forearm", "forearm", "forearm, radius, ulna", "FOREARM RADIUS ULNA RADIUSULNA",
          "14975008 T-D8500 62413002 T-12420 23416004 T-12430 110535000 T-12403 45631007 T-47300 44984001 T-47200"),
    _part("elbow", "elbow", "elbow, elbows, olecranon", "ELBOW ELBOWS", "16953009 T-15430"),
    _part("upper arm", "humerus", "humerus, upper arm", "HUMERUS ARM UPPERARM",
          "85050009 T-12410 40983000 T-D8200 17137000 T-47160 20115005 T-49350"),
    _part("shoulder", "shoulder", "shoulder, shoulders", "SHOULDER SHOULDERS", "16982005 T-D2220"),
    _part("clavicle", "shoulder", "clavicle, collarbone, collar bone", "CLAVICLE", "51299004 T-12310"),
    _part("scapula", "shoulder", "scapula, shoulder blade", "SCAPULA", "79601000 T-12280"),
    _part("acromioclavicular joint", "shoulder", "acromioclavicular joint, ac joint", "ACJOINT ACROMIOCLAVICULARJOINT",
          "85856004 T-15420"),
    _part("axilla", "", "axilla, armpit", "AXILLA AXILLARYA AXILLARYV", "91470000 T-D8104 67937003 T-47100 68705008 T-49110"),
    _part("upper limb", "", "upper limb, upper extremity, arm", "UPPERLIMB UPPEREXTREMITY UPEXM UPPEREXT",
          "53120007 T-D8000 371195002 T-D0821 30608006 T-13600", MUSCULOSKELETAL),
    # leg
    _part("hip", "hip", "hip, hips, acetabulum, femoral neck, femoral head", "HIP HIPS HIPJOINT", "24136001 T-15710 29836001 T-D2500"),
    _part("pelvis", "hip", "pelvis, pelvic", "PELVIS BONYPELVIS PELVISHIP ILIUM INTRAPELVIC",
          "816092008 12921003 T-D6000 22356005 T-12340 816989007 118645006 T-12375"),
    _part("sacroiliac joint", "hip", "sacroiliac joint, si joint", "SIJOINT SACROILIACJOINT", "39723000 T-15680"),
    _part("buttock", "hip", "buttock", "BUTTOCK GLUTEAL", "46862004 T-D2600"),
    _part("groin", "hip", "groin, inguinal", "INGUINAL GROIN LINGUINAL RINGUINAL",
          "26893007 T-D7000 85119005 T-D7020 37117007 T-D7010"),
    _part("femur", "femur", "femur, thigh, femoral shaft", "FEMUR THIGH UPPERLEG", "71341001 T-12710 68367000 T-D9100"),
    _part("leg", "leg", "leg, lower leg, calf, shin", "LEG LOWERLEG CALF", "30021000 T-D9400 53840002 T-D9440"),
    _part("tibia", "leg", "tibia", "TIBIA TIBIAFIBULA TIBFIB", "12611008 T-12740 110536004 T-12701"),
    _part("fibula", "leg", "fibula", "FIBULA", "87342007 T-12750"),
    _part("knee", "leg", "knee, knees", "KNEE KNEES", "72696002 T-D9200 49076000 T-15720 32361000 T-D9310"),
    _part("patella", "leg", "patella, kneecap", "PATELLA", "64234005 T-12730"),
    _part("ankle", "leg", "ankle, ankles, malleolus", "ANKLE ANKLES", "70258002 T-15750 344001"),
    _part("foot", "leg", "foot, feet, metatarsal", "FOOT FEET SESAMOID TARSUS", "56459004 T-D9700 58742003 T-12980 27949001 T-15770"),
    _part("heel", "leg", "calcaneus, heel", "CALCANEUS HEEL OSCALCIS", "80144004 T-12770"),
    _part("toe", "leg", "toe, toes", "TOE TOES", "29707007 T-D9800"),
    _part("lower limb", "", "lower limb, lower extremity", "LOWERLIMB LOWEREXTREMITY LOWEXM LOWEREXT",
          "61685007 T-D9000 72001000 T-12700 102292000 T-14668", MUSCULOSKELETAL),
    _part("extremity", "", "extremity, limb", "EXTREMITY EXTREMITIES", "66019005 T-D0300", MUSCULOSKELETAL),
    # chest
    _part("chest", "chest", "chest, thorax", "CHEST THORAX", "816094009 51185008 T-D3000 43799004 T-D3200 67734004 302551006"),
    _part("lung", "chest", "lung, lungs", "LUNG LUNGS", "39607008 T-28000 86598002 T-280A0", LUNG),
    _part("heart", "chest", "heart, cardiac", "HEART CARDIAC ENDOCARDIAC CORONARYSINUS LATRIUM LVENTRICLE RATRIUM RVENTRICLE",
          "80891009 T-32000 113257007 T-30000 87878005 T-32600 53085002 T-32500 82471001 T-32300 73829009 T-32200 59652004 T-32100 "
          "21814001 T-32400 90219004 T-48410", HEART),
    _part("coronary artery", "chest", "coronary artery, coronary arteries", "CORONARYARTERY CORONARY", "41801008 T-43000", HEART),
    _part("thoracic aorta", "chest", "thoracic aorta, aortic arch", "THORACICAORTA AORTICARCH ASCAORTA DESCAORTA",
          "113262008 T-42070 57034009 T-42300 54247002 T-42100 32672002 T-42400", HEART),
    _part("aorta", "", "aorta", "AORTA", "15825003 T-42000", HEART),
    _part("pulmonary artery", "chest", "pulmonary artery", "PULMONARYA LPULMONARYA RPULMONARYA PULMONARYV",
          "81040000 T-44000 50408007 T-44400 78480002 T-44200 122972007 T-48581", HEART),
    _part("superior vena cava", "chest", "superior vena cava", "SVC", "48345005 T-48610", HEART),
    _part("mediastinum", "chest", "mediastinum", "MEDIASTINUM THYMUS", "72410000 T-D3300 9875009 T-C8000", LUNG),
    _part("trachea", "chest", "trachea, bronchus, airway", "TRACHEA BRONCHUS TRACHEABRONCHUS",
          "44567001 T-25000 955009 T-26000 110726009 T-DD006", LUNG),
    _part("ribs", "chest", "rib, ribs", "RIB RIBS", "113197003 T-11300", MUSCULOSKELETAL),
    _part("sternum", "chest", "sternum, breastbone", "STERNUM SCJOINT PARASTERNAL",
          "56873002 T-11210 7844006 T-15610 91691001 T-D3136", MUSCULOSKELETAL),
    _part("breast", "breast", "breast, breasts", "BREAST BREASTS",
          "76752008 T-04000 76365002 T-04004 33564002 T-04005 77831004 T-04002 19100000 T-04003"),
    # abdomen and the organs of the pelvis
    _part("abdomen", "abdomen", "abdomen, belly", "ABDOMEN ABD KUB EPIGASTRIC HYPOGASTRIC UMBILICAL FLANK LLQ LUQ RLQ RUQ",
          "818981001 113345001 T-D4000 818983003 302553009 27947004 T-D4200 11708003 T-D4240 90290004 T-D4230 58602004 T-D2310 "
          "68505006 T-D4140 86367003 T-D4130 48544008 T-D4120 50519007 T-D4110 19695001 T-D4210 133945003 T-D4211 133946002 T-D4212"),
    _part("liver", "abdomen", "liver, hepatic", "LIVER HEPATICA HEPATICV LHEPATICV RHEPATICV MIDHEPATICV PORTALV LPORTALV RPORTALV",
          "10200004 T-62000 303270005 T-50007 76015000 T-46420 8993003 T-48720 32764006 T-48810", GI),
    _part("gallbladder", "abdomen", "gallbladder, bile duct", "GALLBLADDER BILEDUCT COMMONBILEDUCT BILIARYTRACT",
          "28231008 T-63000 28273000 T-60610 79741001 T-64500 34707002 T-60600 110621006 T-65600", GI),
    _part("pancreas", "abdomen", "pancreas", "PANCREAS PANCREATICDUCT", "15776009 T-65000 69930009 T-65010", GI),
    _part("spleen", "abdomen", "spleen", "SPLEEN SPLENICA SPLENICV", "78961009 T-C3000 22083002 T-46460 35819009 T-48890", GI),
    _part("stomach", "abdomen", "stomach", "STOMACH", "69695003 T-57000", GI),
    _part("oesophagus", "chest", "esophagus, oesophagus", "ESOPHAGUS ENDOESOPHAGEAL", "32849002 T-56000", GI),
    _part("oesophagus, stomach and duodenum", "abdomen", "upper gi tract", "ESOPHAGUSSTOMACHDUODENUM", "110861005 T-DD163", GI),
    _part("small intestine", "abdomen", "small bowel, small intestine", "SMALLINTESTINE DUODENUM JEJUNUM ILEUM",
          "30315005 T-58000 38848004 T-58200 21306003 T-58400 34516001 T-58600", GI),
    _part("colon", "abdomen", "colon, large bowel, large intestine, rectum",
          "COLON LARGEINTESTINE SIGMOID RECTUM ANUSRECTUMSIGMD APPENDIX ENDORECTAL ASCENDINGCOLON DESCENDINGCOLON TRANSVERSECOLON "
          "ANUS",
          "71854001 T-59300 14742008 T-59000 60184004 T-59470 34402009 T-59600 110612005 T-59490 66754008 T-59200 9040008 T-59420 "
          "32622004 T-59460 485005 T-59440 53505006 T-59900", GI),
    _part("kidney", "abdomen", "kidney, kidneys, renal", "KIDNEY KIDNEYS ENDORENAL RENALA RENALV",
          "64033007 T-71000 2841007 T-46600 56400007 T-48740 25990002 T-72000", GU),
    _part("urinary tract", "abdomen", "ureter, urinary tract, urethra", "URETER ENDOURETERIC UPRURINARYTRACT URETHRA ENDOURETHRAL",
          "87953007 T-73000 431491007 T-7000B 13648007 T-75000", GU),
    _part("bladder", "abdomen", "bladder", "BLADDER BLADDERURETHRA ENDOVESICAL",
          "89837001 T-74000 110837003 T-DD123 48367006 T-74250", GU),
    _part("adrenal gland", "abdomen", "adrenal, adrenal gland", "ADRENAL", "23451007 T-B3000", GU),
    _part("prostate", "abdomen", "prostate", "PROSTATE SEMVESICLE", "41216001 T-92000 64739004 T-93000", GU),
    _part("uterus", "abdomen", "uterus, cervix, ovary, ovaries",
          "UTERUS CERVIX OVARY ENDOMETRIUM VAGINA ENDOVAGINAL PLACENTA GESTSAC AMNIOTICFLUID",
          "35039007 T-83000 71252005 T-83200 15497006 T-87000 110639002 T-88920 76784001 T-82000 2739003 T-83400 78067005 T-F1100", GU),
    _part("testis", "abdomen", "testis, testicle, scrotum, penis", "TESTIS SCROTUM PENIS EPIDIDYMIS",
          "40689003 T-94000 20233005 T-98000 18911002 T-91000 87644002 T-95000", GU),
    _part("retroperitoneum", "abdomen", "retroperitoneum", "RETROPERITONEUM", "82849001 T-D4900"),
    _part("abdominal aorta", "abdomen", "abdominal aorta", "ABDOMINALAORTA", "7832008 T-42500", VESSELS),
    _part("inferior vena cava", "abdomen", "inferior vena cava", "INFVENACAVA IVC", "64131007 T-48710", VESSELS),
    _part("mesenteric vessels", "abdomen", "mesenteric artery", "MESENTRICA MESENTRICV SMA INFMESA CELIACA",
          "86570000 T-46500 128583004 T-4884A 42258001 T-46510 33795007 T-46520 57850000 T-46400", VESSELS),
    _part("iliac vessels", "hip", "iliac artery", "ILIACA ILIACV COMILIACA COMILIACV EXTILIACA EXTILIACV INTILIACA",
          "10293006 T-46700 244411005 T-4940E 73634005 T-46710 46027005 T-48920 113269004 T-46910 63507001 T-48930 "
          "90024005 T-46740", VESSELS),
    _part("femoral vessels", "femur", "femoral artery, femoral vein",
          "FEMORALA FEMORALV CFA CFV SFA SFV PROFFEMA PROFFEMV LFEMORALA RFEMORALA",
          "7657000 T-47400 83419000 T-49410 181347005 T-47402 181349008 T-47403 31677005 T-47440 113270003 T-47420 "
          "69833005 T-47410", VESSELS),
    _part("leg vessels", "leg", "popliteal artery, tibial artery", "POPLITEALA POPLITEALV ANTTIBIALA POSTIBIALA PERONEALA",
          "43899006 T-47500 56849005 T-49650 68053000 T-47700 13363002 T-47600 8821006 T-47630", VESSELS),
    # head and neck
    _part("head", "skull", "head", "HEAD", "69536005 T-D1100"),
    _part("skull", "skull", "skull, cranium", "SKULL FONTANEL MASTOID TEMPORALBONE",
          "89546000 T-11100 79361005 T-15200 59066005 T-11133 60911003 T-11130 41695006 T-D1160"),
    _part("brain", "skull", "brain, cerebral, intracranial",
          "BRAIN INTRACRANIAL CEREBELLUM CEREBHEMISPHERE THALAMUS LATVENTRICLE 3RDVENTRICLE 4THVENTRICLE CHOROIDPLEXUS PITUITARY "
          "SELLA",
          "12738006 T-A0100 1101003 T-D1400 113305005 T-A6000 372073000 T-A010F 42695009 T-A4000 42575006 T-D1460 66720007 T-A1650"),
    _part("cerebral vessels", "skull", "circle of willis, cerebral artery",
          "CIRCLEOFWILLIS CEREBRALA ACA MCA PCA BASILARA ANTCOMMA POSCOMMA",
          "11279006 T-45520 88556005 T-45510 60176003 T-45540 17232002 T-45600 70382005 T-45900 59011009 T-45800 128320002 T-A0191 "
          "8012006 T-45530 43119007 T-45320"),
    _part("inner ear", "skull", "internal auditory canal, ear", "IAC EAC EAR",
          "361078006 T-AB959 84301002 T-AB200 117590005 T-AB001 22945000 T-AB700"),
    _part("face", "face", "face, facial bones", "FACE FACIALBONES ZYGOMA NASALBONE CHEEK",
          "89545001 T-D1200 91397008 T-11196 13881006 T-11166 74386004 T-11149 60819002 T-D1206"),
    _part("sinuses", "face", "sinus, sinuses, paranasal sinuses", "SINUS SINUSES PARANASALSINUS PNS",
          "2095001 T-22000 15924003 T-22100"),
    _part("nose", "face", "nose, nasal", "NOSE NASOPHARYNX ENDONASAL ENDONASOPHARYNYX",
          "45206002 T-21000 360955006 T-2300C 53342003 T-21300 18962004 T-23050"),
    _part("orbit", "face", "orbit, orbits, eye, eyes", "ORBIT ORBITS EYE OPTICCANAL EYELID",
          "363654007 T-D14AE 371398005 T-D0801 81745001 T-AA000 55024004 T-11102 80243003 T-AA810"),
    _part("jaw", "face", "jaw, mandible, maxilla", "JAW JAWREGION MANDIBLE MAXILLA TMJ",
          "661005 T-D1213 91609006 T-11180 70925003 T-11170 53620006 T-15290"),
    _part("teeth", "face", "tooth, teeth, dental", "TOOTH TEETH DENTAL MOUTH TONGUE",
          "38199008 T-54010 123851003 T-D0662 21974007 T-53000"),
    _part("salivary glands", "face", "parotid, salivary gland", "PAROTID SUBMANDIBULAR",
          "45289007 T-61100 54019009 T-61300 385294005 T-61007"),
    _part("neck", "face", "neck", "NECK SUPRACLAVICULAR SOFTTISSUENECK NECKSOFTTISSUE", "45048000 T-D1600 77621008 T-D1620"),
    _part("throat", "face", "throat, larynx, pharynx", "LARYNX PHARYNX HYPOPHARYNX PHARYNXLARYNX",
          "4596009 T-24100 54066008 T-55000 81502006 T-55300 312535008 T-20101"),
    _part("thyroid", "face", "thyroid", "THYROID PARATHYROID", "69748006 T-B6000 111002 T-B7000"),
    _part("carotid artery", "face", "carotid, carotids, carotid artery", "CAROTID CAROTIDS CCA ICA ECA BULB VERTEBRALA",
          "69105007 T-45010 32062004 T-45100 86117002 T-45300 22286001 T-45200 21479005 T-45170 85234005 T-45700", VESSELS),
    _part("head and neck", "skull face", "head and neck", "HEADNECK", "774007 T-D1000"),
    # spine
    _part("spine", "spine", "spine, vertebra, vertebral column", "SPINE WHOLESPINE SPINALCORD BACK CTSPINE TLSPINE",
          "421060004 T-D04FF 2748008 T-A7010 77568009 T-D2100 297171002 T-D00F7 1217257000 297172009 T-D00F8 1217256009"),
    _part("cervical spine", "spine", "cervical spine, c-spine, c spine", "CSPINE CERVICALSPINE CERVICAL", "122494005 T-11501"),
    _part("thoracic spine", "spine", "thoracic spine, t-spine, dorsal spine", "TSPINE THORACICSPINE DSPINE DORSALSPINE",
          "122495006 T-11502"),
    _part("lumbar spine", "spine", "lumbar spine, l-spine, lower back", "LSPINE LUMBARSPINE LUMBAR LSSPINE LUMBOSACRALSPINE",
          "122496007 T-11503 297173004 T-D00F9 1217253001 52612000 T-D2300"),
    _part("sacrum", "spine", "sacrum, coccyx, tailbone", "SSPINE SACRUM COCCYX", "54735007 T-11AD0 64688005 T-11BF0 1217254007"),
    _part("head and spine", "skull spine", "", "", "110517009 T-11011"),
    # several at once, or all
    _part("chest and abdomen", "chest abdomen", "chest and abdomen", "CHESTABDOMEN", "416550000 R-FAB55"),
    _part("chest, abdomen and pelvis", "chest abdomen hip", "chest abdomen pelvis, trunk, torso",
          "CHESTABDPELVIS CHESTABDOMENPELVIS TRUNK",
          "416775004 R-FAB56 22943007 T-D2000"),
    _part("abdomen and pelvis", "abdomen hip", "abdomen and pelvis", "ABDOMENPELVIS ABDPELVIS ABDOMENANDPELVIS",
          "818982008 416949008 R-FAB57 818987002 63337009"),
    _part("neck and chest", "face chest", "neck and chest", "NECKCHEST", "417437006 R-FAB52"),
    _part("neck, chest and abdomen", "face chest abdomen", "", "NECKCHESTABDOMEN", "416152001 R-FAB53"),
    _part("neck, chest, abdomen and pelvis", "face chest abdomen hip", "", "NECKCHESTABDPELV", "416319003 R-FAB54"),
    _part("pelvis and legs", "hip femur leg", "", "PELVISLOWEREXTREMITY", "1231522001"),
    _part("whole body", "", "whole body", "WHOLEBODY", "38266002 T-D0010"),
)  # fmt: skip

PART_OF_TERM = {term: part for part in PARTS for term in part.terms}
PART_OF_CODE = {code: part for part in PARTS for code in part.codes}
