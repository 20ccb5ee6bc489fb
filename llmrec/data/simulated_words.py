"""The words that titles in the simulated shop are made of."""

from __future__ import annotations

# Topic: its department, then kinds separated by ";", each the words its titles are built from.
TOPICS = {
    "camping": "gear; tent, tarp, bivy shelter; sleeping bag, camp quilt, sleeping pad; camp "
    "stove, mess kit, water filter",
    "cycling": "gear; road bike tyre, inner tube, wheelset; cycling jersey, bib shorts, bike "
    "helmet; bike light, bike lock, pannier bag",
    "kitchen knives": "gear; chef's knife, paring knife, santoku; whetstone, honing steel, knife "
    "sharpener; cutting board, knife block, butcher block",
    "coffee": "gear; espresso machine, portafilter, milk frother; burr grinder, coffee scale, "
    "bean canister; pour-over dripper, gooseneck kettle, paper filters",
    "yoga": "gear; yoga mat, yoga towel, mat strap; yoga block, stretching strap, bolster; yoga "
    "leggings, meditation cushion, grip socks",
    "fishing": "gear; fly rod, fly reel, fly line; crankbait, soft plastic lure, spinnerbait; "
    "tackle box, landing net, fishing waders",
    "painting": "gear; watercolour set, watercolour paper, gouache tubes; oil paint set, "
    "stretched canvas, easel; sable brush, palette knife, brush cleaner",
    "guitar": "gear; electric guitar, guitar strings, guitar strap; tube amplifier, distortion "
    "pedal, reverb pedal; acoustic guitar, capo, fingerpicks",
    "gardening": "gear; tomato seeds, herb seeds, wildflower seeds; pruning shears, hand trowel, "
    "garden fork; raised bed, compost bin, watering can",
    "baby care": "gear; baby stroller, car seat, baby carrier; baby bottle, bottle warmer, "
    "pacifier; cloth diaper, baby wipes, changing pad",
    "space opera": "books; starship captain novel, galactic empire saga, fleet battle novel; "
    "alien contact story, lost colony novel, generation ship story; robot uprising novel, android "
    "detective story, machine mind thriller",
    "crime": "books; murder mystery, police procedural, cold case novel; cosy village mystery, "
    "amateur sleuth novel, country house mystery; courtroom thriller, lawyer drama, jury novel",
    "romance": "books; regency romance, duke and governess romance, ballroom love story; small "
    "town romance, second chance love story, bakery romance; office romance, enemies to lovers "
    "novel, holiday fling novel",
    "cooking": "books; Italian cookbook, pasta recipes, pizza baking guide; vegan cookbook, "
    "plant-based recipes, lentil and bean recipes; bread baking book, sourdough guide, cake "
    "recipes",
    "history": "books; Roman empire history, ancient Greece history, Egyptian pharaohs history; "
    "Second World War history, tank battles history, fighter pilots memoir; medieval knights "
    "history, crusades history, castle builders history",
    "horror": "films; haunted house film, ghost film, possession film; zombie film, infected "
    "outbreak film, undead apocalypse film; slasher film, masked killer film, cabin in the woods "
    "film",
    "family animation": "films; talking animals cartoon, puppy adventure cartoon, jungle friends "
    "cartoon; princess musical cartoon, fairy tale cartoon, enchanted castle cartoon; toy heroes "
    "cartoon, superhero kids cartoon, little robot cartoon",
    "martial arts": "films; kung fu film, shaolin monk film, dojo revenge film; samurai film, "
    "ronin sword film, ninja assassin film; boxing drama, cage fighter film, wrestling comeback "
    "film",
    "racing games": "games; rally racing game, off-road racing game, dirt bike game; kart racing "
    "game, party racer game, arcade racer game; formula racing simulator, touring car simulator, "
    "racing wheel bundle",
    "role-playing games": "games; dragon quest role-playing game, wizard academy role-playing "
    "game, dungeon crawler; monster taming game, creature collecting game, pet battle game; "
    "turn-based tactics game, hex strategy game, fantasy war game",
}
# Words that any title may carry: they tell titles apart and say nothing about the topic.
BRANDS = (
    "Alder & Finch, Northway, Brightwell, Corvo, Delmar, Eastgate, Fairholm, Greyline, Hollis, "
    "Iverson, Juniper Lane, Kestrel, Lowell, Marlowe, Nimbus, Oakhurst, Pemberton, Quill, Redfern, "
    "Sable, Thornbury, Umber, Vantage, Whitlock, Yarrow, Zephyr"
).split(", ")
ADJECTIVES = (
    "Classic, Compact, Deluxe, Essential, Golden, Grand, Hidden, Little, Modern, New, Original, "
    "Perfect, Premium, Quiet, Secret, Silver, Simple, Ultimate, Vintage, Wild"
).split(", ")
DETAILS = (
    "second edition, limited edition, gift set, blue, black, red, green, large, small, 2-pack, "
    "volume 1, volume 2, volume 3, special edition, anniversary edition, starter bundle, "
    "for beginners, for experts, collector's box, travel size"
).split(", ")
