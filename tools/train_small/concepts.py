"""What the small Sana can draw: every glyph with its names (data only).

The first name of a language is what people say, the ones after it are synonyms or the name in Unicode's CLDR.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Concept:
    """One glyph. `animal` may be the one that eats, `food` what is eaten; `plural` marks English names that take no article."""

    glyph: str
    english: tuple[str, ...]
    chinese: tuple[str, ...]
    group: str
    plural: bool = False

    @property
    def name(self) -> str:
        return self.english[0]


#: group: one concept a line, "glyph | English names | Chinese names", a star before an English name without article.
_TABLE = {
    "animal": """
        🐼 | panda | 熊猫
        🐱 | cat, cat face | 猫, 猫脸
        🐶 | dog, dog face | 狗, 狗脸
        🐰 | rabbit, rabbit face | 兔子, 兔子头
        🦊 | fox | 狐狸
        🐻 | bear | 熊
        🐯 | tiger, tiger face | 老虎, 老虎头
        🦁 | lion | 狮子
        🐮 | cow, cow face | 奶牛, 奶牛头
        🐷 | pig, pig face | 猪, 猪头
        🐸 | frog | 青蛙
        🐵 | monkey, monkey face | 猴子, 猴头
        🐧 | penguin | 企鹅
        🦉 | owl | 猫头鹰
        🦋 | butterfly | 蝴蝶
        🐝 | bee, honeybee | 蜜蜂
        🐢 | turtle | 乌龟, 龟
        🐙 | octopus | 章鱼
        🐟 | fish | 鱼
        🐳 | whale, spouting whale | 鲸鱼, 喷水的鲸
        🐘 | elephant | 大象
        🦄 | unicorn | 独角兽
        🐤 | chick, baby chick | 小鸡
        🐞 | ladybug, lady beetle | 瓢虫
    """,
    "food": """
        🍎 | red apple, apple | 红苹果, 苹果
        🍏 | green apple | 青苹果, 绿苹果
        🍌 | banana | 香蕉
        🍇 | *grapes | 葡萄
        🍉 | watermelon | 西瓜
        🍓 | strawberry | 草莓
        🍒 | *cherries | 樱桃
        🍊 | orange, tangerine | 橘子
        🍋 | lemon | 柠檬
        🍍 | pineapple | 菠萝
        🥕 | carrot | 胡萝卜
        🌽 | *corn, *ear of corn | 玉米
        🍅 | tomato | 番茄, 西红柿
        🍄 | mushroom | 蘑菇
        🍔 | hamburger, burger | 汉堡
        🍕 | pizza | 披萨
        🍩 | doughnut | 甜甜圈
        🎂 | birthday cake, cake | 生日蛋糕, 蛋糕
        🍦 | ice cream, soft ice cream | 冰淇淋, 圆筒冰激凌
        🍞 | *bread | 面包
        🎋 | *bamboo, tanabata tree | 竹子, 七夕树
    """,
    "thing": """
        ☕ | cup of coffee, hot beverage | 咖啡, 热饮
        🍜 | bowl of noodles, steaming bowl | 面条, 面碗
        🌻 | sunflower | 向日葵
        🌹 | rose | 玫瑰
        🌷 | tulip | 郁金香
        🌵 | cactus | 仙人掌
        🌲 | tree, evergreen tree | 松树, 常青树
        🌴 | palm tree | 棕榈树
        🍁 | maple leaf | 枫叶
        🌈 | rainbow | 彩虹
        🌞 | sun, sun with face | 太阳, 微笑的太阳
        🌙 | moon, crescent moon | 月亮, 弯月
        ⭐ | star | 星星
        ⛄ | snowman | 雪人
        🔥 | *fire | 火, 火焰
        🌍 | globe | 地球
        🚗 | car, automobile | 汽车
        🚌 | bus | 公交车
        🚲 | bicycle | 自行车
        🚂 | train, locomotive | 火车, 蒸汽火车
        ✈ | airplane | 飞机
        🚀 | rocket | 火箭
        ⛵ | sailboat | 帆船
        🚁 | helicopter | 直升机
        🎈 | balloon | 气球
        🎁 | gift, wrapped gift | 礼物
        ⚽ | soccer ball | 足球
        🎸 | guitar | 吉他
        👑 | crown | 皇冠
        🏠 | house | 房子
        🏰 | castle | 城堡
        💡 | light bulb | 灯泡
        🔑 | key | 钥匙
        ❤ | heart, red heart | 爱心, 红心
        ☂ | umbrella | 雨伞, 伞
        🤖 | robot | 机器人
        👻 | ghost | 鬼, 幽灵
        🎃 | pumpkin, jack-o-lantern | 南瓜灯, 南瓜
        😀 | smiling face, grinning face | 笑脸, 嘿嘿
    """,
}


def _concept(group: str, line: str) -> Concept:
    glyph, english, chinese = (part.strip() for part in line.split("|"))
    names = tuple(name.strip().removeprefix("*") for name in english.split(","))
    return Concept(glyph, names, tuple(name.strip() for name in chinese.split(",")), group, plural="*" in english)


CONCEPTS: tuple[Concept, ...] = tuple(
    _concept(group, line) for group, lines in _TABLE.items() for line in lines.strip().splitlines()
)

#: Background colours: (English, Chinese, RGB of the top, RGB of the bottom where it is a gradient).
COLOURS: tuple[tuple[str, str, tuple[int, int, int], tuple[int, int, int]], ...] = (
    ("white", "白色", (255, 255, 255), (226, 232, 240)),
    ("yellow", "黄色", (255, 226, 120), (255, 243, 200)),
    ("red", "红色", (232, 96, 88), (250, 178, 160)),
    ("blue", "蓝色", (92, 160, 235), (190, 222, 250)),
    ("green", "绿色", (112, 190, 120), (205, 235, 190)),
    ("pink", "粉色", (248, 168, 200), (255, 224, 234)),
    ("purple", "紫色", (158, 128, 216), (218, 202, 244)),
    ("gray", "灰色", (140, 146, 152), (208, 212, 216)),
)
