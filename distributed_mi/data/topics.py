"""Words of the generated data set: forty shopping topics with ten things each, and words that any title may carry."""

TOPICS: dict[str, str] = {
    "Coffee": "espresso grinder kettle mug filter beans percolator frother tamper carafe",
    "Tea": "teapot infuser matcha oolong chai teacup strainer chamomile caddy rooibos",
    "Baking": "whisk spatula cupcake flour oven rolling-pin yeast fondant sieve muffin",
    "Barbecue": "grill charcoal smoker skewer tongs brisket brazier marinade apron briquettes",
    "Gardening": "trowel seeds shears compost planter hose rake fertilizer greenhouse mulch",
    "Fishing": "rod reel lure tackle bait hook waders bobber sinker float",
    "Camping": "tent sleeping-bag lantern campfire hammock canteen tarp cot bivouac firestarter",
    "Hiking": "trekking-pole rucksack compass boots gaiters trail-map hydration-pack summit anorak whistle",
    "Cycling": "bicycle helmet saddle pedal handlebar derailleur spoke tyre pannier chainring",
    "Running": "sneakers marathon singlet pacer stopwatch shorts treadmill insole armband racing-belt",
    "Swimming": "goggles swimsuit kickboard snorkel flippers swim-cap paddle noseclip towel poncho",
    "Yoga": "yoga-mat bolster strap meditation cushion leggings incense block pilates chant",
    "Weightlifting": "dumbbell barbell bench kettlebell squat-rack wrist-wrap plate chalk deadlift pull-up-bar",
    "Tennis": "racket tennis-ball racquet-string net-post wristband court-shoe overgrip visor umpire serve-trainer",
    "Golf": "putter driver tee caddie golf-glove wedge fairway bunker-rake divot iron",
    "Skincare": "moisturizer serum cleanser sunscreen toner exfoliator retinol face-mask collagen balm",
    "Makeup": "lipstick mascara eyeliner foundation blush concealer eyeshadow bronzer primer lip-gloss",
    "Haircare": "shampoo conditioner hairbrush curling-iron pomade hairspray detangler blow-dryer scalp-oil scrunchie",
    "Perfume": "cologne fragrance eau-de-parfum atomizer jasmine sandalwood musk bergamot vetiver amber",
    "Jewelry": "necklace earring bracelet pendant ring gemstone brooch anklet cufflink tiara",
    "Watches": "chronograph wristwatch bezel watch-strap quartz dial winder tourbillon clasp timepiece",
    "Guitars": "guitar capo fretboard pick amplifier ukulele tuner pickup humbucker strings",
    "Pianos": "piano keyboard pedalboard metronome synthesizer sheet-music stool hammer soundboard organ",
    "Drums": "snare cymbal drumstick bongo tom-tom hi-hat djembe drum-pad cowbell tambourine",
    "Photography": "camera tripod lens flashgun shutter lightbox memory-card viewfinder aperture photo-album",
    "Painting": "easel canvas acrylics watercolor palette paintbrush gesso sketchpad pastels varnish",
    "Knitting": "yarn crochet needles wool skein bobbin mohair pattern-book stitch-marker cardigan",
    "Sewing": "thread thimble bobbin-case fabric zipper buttons scissors seam-ripper quilt pincushion",
    "Woodworking": "chisel saw lathe sandpaper plywood clamp router dowel plane workbench",
    "Plumbing": "wrench faucet pipe gasket valve plunger sealant drain washer spigot",
    "Lighting": "lamp chandelier bulb dimmer sconce floodlight nightlight lampshade spotlight fairy-lights",
    "Bedding": "pillow duvet mattress blanket bedsheet comforter quilt-cover pillowcase topper eiderdown",
    "Puppies": "leash dog-collar kennel chew-toy kibble dog-bed harness puppy-treats muzzle fetch-ball",
    "Kittens": "litter-box scratching-post catnip cat-tree tunnel feather-wand cat-collar tuna cat-flap yarn-mouse",
    "Aquariums": "aquarium fish-tank filter-pump guppy coral gravel heater driftwood algae-scraper air-stone",
    "Babies": "stroller crib pacifier diaper bib rattle baby-monitor high-chair swaddle teether",
    "Puzzles": "jigsaw crossword sudoku brainteaser maze tangram cube logic-game riddle domino",
    "Chess": "chessboard knight bishop rook pawn chess-clock checkmate gambit queen endgame",
    "Gaming": "console joystick controller headset game-pad arcade gaming-mouse graphics-card steering-wheel cartridge",
    "Astronomy": "telescope eyepiece star-chart binoculars planetarium nebula meteorite moon-globe orbit observatory",
}
"""Topic -> ten nouns of its own, separated by blanks; a hyphen inside a noun is printed as a blank."""

STYLES = ("Classic", "Compact", "Deluxe", "Premium", "Everyday")
"""Words shared by all topics. Ten nouns in five styles give fifty different titles for each topic."""

BRANDS = ("Northfield", "Lumora", "Brightway", "Kestrel", "Oakline", "Veloria", "Tidewell", "Maplecrest")
"""Made-up brands shared by all topics."""
