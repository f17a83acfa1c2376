"""The chat template of a command's prompts: the options that several commands share."""

import dataclasses
from typing import Any

from dflash.cli.option import refuse_unused
from dflash.text.tokenizer import FIXED_DAY, Tokenizer, load_tokenizer, template_variables


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TemplateOptions:
    """What a chat template gets besides the messages."""

    chat_template_arg: tuple[str, ...] = ()
    """Variables of the chat template: enable_thinking=false reasoning_effort=low."""
    template_date: str = FIXED_DAY
    """Day that the chat template takes for today: YYYY-MM-DD."""

    def open(self, target: str) -> Tokenizer:
        """The tokenizer of a target, with this template. Raises TokenizerError."""
        variables = template_variables(self.chat_template_arg)
        return load_tokenizer(target, variables=variables, template_date=self.template_date)


def refuse_unused_template(arguments: Any, raw: bool) -> None:
    """Raises ConfigError for options of a template among a command's arguments, where `raw` prompts get none."""
    if raw:
        names = [field.name for field in dataclasses.fields(TemplateOptions)]
        refuse_unused(arguments, names, "for a chat template, and --raw puts none around the words")
