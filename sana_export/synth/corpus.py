"""The text that the tokenizer of the synthetic checkpoints is trained on: captions in English and Chinese, and emoji (data only).

A few hundred words are enough, because the tokenizer encodes unknown characters as bytes.
"""

from __future__ import annotations

ENGLISH = """
a cute panda eating bamboo, ink drawing style
a red apple on a wooden table, soft morning light
a small white cat sleeping on a warm windowsill next to a pot of flowers
a golden retriever puppy running through a field of yellow sunflowers
an old lighthouse on a rocky cliff above a stormy ocean at night
a watercolor painting of a quiet village beside a river in autumn
a portrait of an elderly fisherman with a grey beard, photorealistic, highly detailed
a futuristic city with flying cars and neon signs in the rain
a bowl of noodle soup with egg, green onions and a pair of chopsticks
a castle on a floating island surrounded by white clouds, fantasy art
a steaming cup of coffee and an open book on a rainy afternoon
two children building a sand castle on the beach under a blue sky
a cyberpunk street market full of people, lanterns and glowing shops
a black and white photo of an empty train station in winter
a robot holding a red balloon in a snowy forest, cinematic lighting
a hot air balloon over green mountains at sunrise, wide angle
a bouquet of pink roses and white lilies in a glass vase, oil painting
an astronaut riding a horse on the surface of the moon
a dragon made of fire and smoke flying above a dark medieval town
a cozy living room with a fireplace, a sofa and a sleeping dog
a bicycle leaning against a brick wall covered with ivy
a macro photo of a blue butterfly on a purple flower
a plate of fresh fruit with grapes, oranges, bananas and strawberries
a wooden boat on a calm lake that mirrors the mountains and the trees
a fox in the snow, digital illustration, soft colors, simple background
a street musician playing the violin in front of a cafe in paris
a tall glass tower in the desert under a sky full of stars
a close up of a human eye with a reflection of the galaxy
a group of penguins walking on ice toward the sea
a vintage car parked in front of a small house in the countryside
a chef in a white hat cooking fish in a busy kitchen
a girl with long hair and a yellow umbrella walking in the rain
a boy in a blue jacket looking at fireworks over the harbor
a mountain temple among cherry trees in full bloom, spring morning
a whale swimming between the clouds, surreal, dreamlike, pastel colors
a tiny house inside a light bulb, studio photo, shallow depth of field
a tiger drinking water from a stream in a dense jungle
a stack of pancakes with honey and butter on a blue plate
an owl sitting on a branch in front of a full moon
a paper boat sailing on a puddle, low angle, bright colors
a marble statue of a woman with flowers in her hair, 8k, sharp focus
a pixel art knight with a sword and a shield
a logo of a green leaf on a white background, flat design, vector
a map of an imaginary island with forests, rivers and hidden treasure
a traditional tea house in a bamboo garden after the rain
a snowman with a carrot nose and a red scarf in front of a cabin
a crowd watching a soccer game in a large stadium at dusk
a space station orbiting a blue planet with two rings
a field of lavender under a pink sunset, impressionist style
a sleeping baby elephant next to its mother, warm light, national park
low quality, blurry, distorted, bad anatomy, extra fingers, watermark, text
worst quality, ugly, oversaturated, cropped, out of frame, jpeg artifacts
"""

CHINESE = """
一只可爱的熊猫在竹林里吃竹子，水墨画风格
一个红色的苹果放在木桌上，柔和的晨光
一只白色的小猫在窗台上睡觉，旁边有一盆花
金色的小狗在向日葵田里奔跑
夜晚暴风雨中的灯塔，海浪拍打着悬崖
秋天河边的安静小村庄，水彩画
一位白胡子老渔夫的肖像，照片级真实感，细节丰富
未来城市，霓虹灯，飞行汽车，下雨的夜晚
一碗热气腾腾的牛肉面，上面有鸡蛋和葱花
云海中漂浮的城堡，奇幻艺术
下雨的午后，一杯咖啡和一本打开的书
两个孩子在蓝天下的海滩上堆沙堡
热闹的夜市，红色的灯笼，很多人
冬天空荡荡的火车站，黑白照片
雪中的森林里，一个机器人拿着红色的气球，电影感光线
日出时分，热气球飞过绿色的山谷
玻璃花瓶里的粉色玫瑰和白色百合，油画
一个宇航员在月球上骑马
喷火的巨龙飞过黑暗的小镇
温暖的客厅，壁炉，沙发和睡着的狗
长满爬山虎的砖墙边停着一辆自行车
紫色花朵上的蓝色蝴蝶，微距摄影
一盘新鲜的水果，葡萄，橙子，香蕉和草莓
平静的湖面上有一条小木船，倒映着群山
雪地里的狐狸，插画，简单的背景
春天的早晨，樱花盛开的山中寺庙
一条鲸鱼在云朵之间游泳，超现实，梦幻
一只老虎在茂密的丛林里喝水
猫头鹰站在树枝上，身后是一轮满月
像素风格的骑士，手里拿着剑和盾牌
雨后的竹园，传统的茶馆
穿着红色围巾的雪人站在小木屋前
黄昏时分，体育场里看足球比赛的人群
蓝色的行星，空间站，星空，银河
粉色的晚霞下，一片薰衣草花田，印象派
长城，故宫，黄山，西湖，桂林山水，敦煌壁画
一个穿着汉服的女孩站在桥上，手里拿着一把油纸伞
中国龙，凤凰，麒麟，剪纸，青花瓷，国画
高质量，高清，超高分辨率，最佳质量，大师作品
低质量，模糊，变形，多余的手指，水印，文字
"""

#: Words that captions are made of, each to become one token.
ENGLISH_WORDS = """
above across air airplane alone along ancient anime animal another arch architecture armor around artist artwork
aurora
background ball bamboo band bathroom beautiful bedroom behind below beneath between big bird birthday bloom board body
bold bottle bottom bowl bridge bright broken bronze brown brush building bunny burger bus bush cactus cake camera
candle
candy canyon cartoon cave chair character charcoal cheese cherry chicken child chinese chocolate church circle city
classic
clay clear clock close closeup cloth coast cold collage color colorful comic composition concept contrast corn
corner costume
couple covered cow cream creature crown crystal cup cute dance dancer dark dawn day deep deer desk dessert detail
dinner
dinosaur doll dolphin door dragon dramatic dream dress drink drone duck dust eagle earth east elegant emerald engine
enormous epic evening expression face fairy family fantasy farm fashion feather female festival figure film fire
fireworks
first floating floor flower fluffy fog food forest fountain four frame fresh friend frog front fruit full funny fur
futuristic garden giant giraffe girl glass gold golden gothic gown grand grape graphic grass gray great ground
guitar hall
hand happy hat heart heavy high hill hold horizon horse hot hotel huge human ice icon image indoor insect iron island
ivory jacket japanese jar jelly jewel journey juice jungle kid king kitten knight ladder lady lamp landscape large
laser
laughing leather leaves left lemon lens letter library light lightning line lion little living lizard long lovely low
luxury machine magic magical male mask massive master masterpiece meadow mechanical metal mice middle milk mini
minimal
minimalist mirror mist misty model modern monkey monster moody moon moonlight morning moss mother motion motorcycle
mouse
movie mug museum mushroom music mysterious natural nature near neck neon nest new next ninja noodle north nose number
ocean octopus office old opera orange orchid ornate outdoor outside over owl packed paint painting pair palace palm
paper
park parrot party path pattern peaceful peach pearl pen pencil people perfect person phone photo photograph
photography
piano pig pillow pilot pine pink pirate pizza plain plane planet plant plate playful playing polar pond pool portrait
poster pot pottery pretty prince princess product professional pumpkin puppy purple queen quiet rabbit race rainbow
raining
raw ray realistic rectangle red reflection render retro ribbon rice ride right river road rock rocket roof room rope
rose round royal ruins running rural sad sail salad samurai sand scene scenery school science sculpture sea seat
see serene shadow shape sharp sheep ship shirt shoe shop shore short side sign silhouette silk silver sitting six
sketch
skin sky skyline slice smile smiling smoke smooth snake snow soccer socks soft soldier south spaceship spider spiral
sport
spring square squirrel stairs standing star steam steampunk steel still stone storm story strange strawberry street
studio stunning summer sun sunglasses sunlight sunny sunrise sunset superhero surface surreal sushi swan sweater sweet
swimming sword symmetrical table tail tea teacher teapot teddy temple ten tent texture theme thick thin three throne
tile tiny toast tower toy traditional train transparent traveler tree triangle tropical truck tulip turtle twilight
twin two
ultra under underwater unicorn universe up vase vegetable velvet very vibrant victorian view village vintage violet
volcano wall warm warrior water watercolor waterfall watermelon wave wearing wedding west wet white wild wind window
wine
wings winter wizard wolf woman wood wooden wool world writing yellow young zebra zen zoo
"""

CHINESE_WORDS = """
可爱 熊猫 竹子 竹林 水墨画 苹果 小猫 小狗 猫咪 狗狗 兔子 狐狸 老虎 狮子 大象 长颈鹿 猴子 企鹅 海豚 鲸鱼 乌龟 蝴蝶
蜜蜂 小鸟 老鹰 凤凰 恐龙 独角兽
红色 橙色 黄色 绿色 蓝色 紫色 粉色 黑色 白色 灰色 金色 银色 彩虹 透明 明亮 黑暗 柔和 鲜艳 温暖 寒冷 安静 热闹 巨大
微小 美丽 漂亮 古老 现代 未来
春天 夏天 秋天 冬天 早晨 中午 黄昏 夜晚 日出 日落 晚霞 月亮 太阳 星星 星空 银河 云朵 下雨 下雪 雪花 闪电 暴风雨 大雾
阳光 月光 影子
山水 高山 山峰 河流 湖泊 大海 海滩 沙漠 草原 森林 丛林 瀑布 岛屿 火山 峡谷 田野 花园 公园 村庄 城市 街道 小巷 桥梁
城堡 宫殿 寺庙 教堂 高楼 房子 小屋 窗户 房间 客厅 厨房 卧室 图书馆 学校 商店 咖啡馆 餐厅
男孩 女孩 孩子 老人 男人 女人 妈妈 爸爸 朋友 家人 公主 王子 国王 骑士 武士 忍者 巫师 仙女 天使 宇航员 机器人 老师
医生 厨师 画家 音乐家 舞者
汽车 火车 飞机 轮船 自行车 摩托车 公交车 火箭 飞船 热气球 帆船 相机 手机 电脑 书本 钢琴 吉他 小提琴 灯笼 气球 雨伞
帽子 围巾 裙子 汉服 眼镜 杯子 茶壶 花瓶 蜡烛 礼物 玩具
面条 米饭 饺子 包子 月饼 火锅 蛋糕 面包 冰淇淋 巧克力 咖啡 牛奶 果汁 香蕉 葡萄 西瓜 草莓 樱桃 柠檬 橘子 蔬菜 番茄
胡萝卜 玉米 蘑菇 鸡蛋
玫瑰 百合 樱花 梅花 荷花 向日葵 薰衣草 郁金香 树木 树叶 草地 花朵 仙人掌
油画 水彩画 素描 插画 动漫 卡通 像素 照片 肖像 风景 特写 微距 摄影 写实 抽象 极简 复古 赛博朋克 蒸汽朋克 科幻 奇幻
梦幻 超现实 国画 剪纸 青花瓷 浮世绘 雕塑 壁画 海报 背景 光线 细节 风格 质感 构图 电影感 高清 质量 模糊
吃着 喝水 跑步 跳舞 唱歌 睡觉 坐在 站在 躺在 看着 拿着 穿着 戴着 骑着 飞过 游泳 微笑 大笑 哭泣 读书 画画 旁边 上面
下面 里面 外面 前面 后面 中间 一个 一只 一条 一位 一座 一朵 一杯 两个 三个 许多
"""

#: Every character of these lines becomes a token of its own.
EMOJI = """
😀 😃 😄 😁 😆 😅 😂 🙂 🙃 😉 😊 😇 🥰 😍 🤩 😘 😋 😜 🤗 🤔 😐 😴 😎 🥳 😢 😭 😱 😡 😈 💀 👻 👽 🤖 💩 😺
👋 👌 👍 👎 👏 🙏 💪 👀 👶 👦 👧 👨 👩 👴 👵 👮 👷 👸 🧙 🧚 🧜 🏃 💃 🕺 🏄 🏊 🚴
🐶 🐱 🐭 🐹 🐰 🦊 🐻 🐼 🐨 🐯 🦁 🐮 🐷 🐸 🐵 🐔 🐧 🐦 🐤 🦆 🦅 🦉 🦇 🐺 🐗 🐴 🦄 🐝 🐛 🦋 🐌 🐞 🐜 🕷 🐢 🐍 🦎 🐙 🦑
🦀 🐠 🐟 🐬 🐳
🐋 🦈 🐊 🐅 🐆 🦓 🦍 🐘 🐪 🦒 🐃 🐎 🐑 🐐 🦌 🐕 🐈 🐓 🦃 🕊 🐇 🐿 🦔 🐉 🐲
💐 🌸 🌹 🌺 🌻 🌼 🌷 🌱 🌲 🌳 🌴 🌵 🌾 🍀 🍁 🍂 🍃 🎋 🎍 🍄 🌰
🍇 🍈 🍉 🍊 🍋 🍌 🍍 🍎 🍏 🍐 🍑 🍒 🍓 🥝 🍅 🥥 🥑 🍆 🥔 🥕 🌽 🌶 🥒 🍞 🧀 🍖 🍗 🍔 🍟 🍕 🌭 🍳 🍲 🍿 🍱 🍙 🍚 🍜 🍝
🍣 🍤 🍦 🍩 🍪
🎂 🍰 🍫 🍬 🍭 🍯 🥛 ☕ 🍵 🍷 🍺
🌍 🌙 🌚 🌞 ⭐ 🌟 🌈 ☀ ☁ ⛅ ⛈ 🌧 ❄ ⛄ ⚡ 🔥 💧 🌊 🌋 🏔 🏖 🏝 🏠 🏡 🏢 🏰 🗼 🗽 ⛩ 🌃 🌅 🌆
🚗 🚕 🚌 🚒 🚓 🚚 🚲 🏍 🚂 🚆 ✈ 🚀 🛸 🚁 ⛵ 🚢 ⚓
⚽ 🏀 🏈 ⚾ 🎾 🏐 🎱 🏆 🎮 🎲 🎨 🎭 🎤 🎧 🎹 🎸 🎻 🥁 🎈 🎉 🎁 🎄 🎃 🎆 📷 📱 💻 💡 📚 ✏ ✂ 🔑 🔨 ⚔ 🛡 💎 👑 👒 👓 👗
👟 🎩 ☂ ⌚
❤ 💛 💚 💙 💜 🖤 💔 💕 ✨ 💫 💥 💦 💤 ✅ ❌ ❓ ❗ ♻ ⚠ 🔴 🔵 ⚫ ⚪
"""
#: The joiner, the emoji presentation selector and the skin tones, written out because they cannot be seen.
EMOJI_MODIFIERS = "\u200d\ufe0f\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
