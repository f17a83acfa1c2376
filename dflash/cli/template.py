"""The chat template of a command's prompts: the options that several commands share."""

import dataclasses

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
