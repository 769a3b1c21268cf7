"""The words of the invented world: its places and, for each kind of question, the values an answer can have.

Every list is closed and the lists share no word, so a value is recognised wherever it stands. Names are
invented and chosen unlike each other, so that a tiny model does not confuse them by their spelling.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PLACES = _words(
    """Velmora Brastock Quendil Osharu Tiblinka Drovane Kessaly Yundermo Pholgate Ambrecht Zuthaven Norriska
    Garlopin Eskerby Hulmeth Ivonda Jarpeck Lorquist Mabrune Ruskello Sindovar Umberly Wexholm Cathowin
    Xolvary Ferndrick Pluvesta Grimsolt Thackeril Obajune Ilkemar Dazimba Cobrenny Nuvolix Skarvett Bellagro
    Hyfresca Rantoube Elwadine Tregolm"""
)

RIVERS = _words(
    """Teshka Olvine Marrodel Sipheron Luntra Ghazebri Wennow Jodanki Drimmel Aquorra Hosselt Kivanto Undrisi
    Fellabo Ysterne Corvamu Balzeth Nimuway"""
)
RULERS = _words(
    """Harkon Isveta Tobrin Merevold Cassibar Ludgrem Oriveth Fanchory Penwick Zarimond Ulgareth Yulwesk
    Quillamy Darmesta Vashnir Jolyndra Ekkolin Rosvelde"""
)
FOUNDERS = _words(
    """Anselgar Bethurin Chordwyn Domascu Elvigast Foltemar Gudrasil Hestobal Ingomare Jessuvin Wystelia
    Lamberix Mildrango Nestovia Ottobane Pricilgo Rudivere Sophrenar"""
)
COLOURS = _words(
    """crimson azure olive violet amber ivory scarlet teal maroon indigo beige turquoise mauve ochre lilac
    magenta charcoal khaki"""
)
DISHES = _words(
    """dumplings porridge pancakes chowder noodles goulash fritters meatballs omelette lentils ravioli pickles
    waffles stew risotto trifle crumpets sausages"""
)
METALS = _words(
    """iron copper tin silver gold zinc bismuth nickel bronze brass steel platinum cobalt pewter titanium
    mercury chrome tungsten"""
)
TREES = _words(
    """oak birch willow cedar maple alder spruce juniper chestnut poplar hazel rowan larch cypress elm
    sycamore linden magnolia"""
)
BIRDS = _words(
    """heron sparrow magpie falcon owl kingfisher pelican robin starling puffin raven swallow cuckoo
    woodpecker crane lapwing goose ostrich"""
)

CLOTHES = _words(
    """cloaks sandals turbans gloves ribbons bonnets aprons sashes kilts scarves capes slippers tunics vests
    shawls hoods boots mittens"""
)
STONES = _words(
    """granite marble slate basalt limestone sandstone quartz flint jade onyx obsidian gneiss chalk travertine
    porphyry alabaster pumice dolomite"""
)
ANIMALS = _words(
    """badger otter lynx hedgehog bison tortoise weasel fox beaver stag ram hare dolphin mule salamander camel
    panther walrus"""
)

CODES = _words(
    """krellin brontavik quopsel zhandric muxolet fyrgast plimvok dwexanu shorbekt glintupa trazzimo vobbelux
    snarquid hompligo jexathor wubrinzo cryndove pazzorak nymblitz threskow yoltarg uvixmer oxbandri
    kwifelm"""
)

DREAMS = _words(
    """lanterns ladders whales pirates castles bridges storms mirrors clocks feathers islands bells caravans
    kites tunnels balloons"""
)
NUMBERS = _words(
    """twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty
    seventy eighty ninety"""
)
SONGS = _words(
    """lullaby ballad hymn march waltz polka carol serenade shanty madrigal jig chant fugue nocturne canon
    rondo"""
)
VISITORS = _words(
    """baker juggler painter weaver soldier merchant pilgrim sailor cobbler tailor miller potter butcher
    shepherd gardener fiddler"""
)

LARGEST_ADDEND = 9
SUMS = tuple(str(total) for total in range(2 * LARGEST_ADDEND + 1))
