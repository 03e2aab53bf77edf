"""Constructor arguments of the instruments, for the tests that run all of them."""

SETTINGS: dict[str, list[dict]] = {
    # The first is the one that every contract is tested with. The others emit what it does not.
    # An instrument that is not here is made without arguments.
    "HeadScores": [{}, {"strict": False}],
}
