from maestro_pl.meta.signals import MetaSignal


class LookaheadSignal(MetaSignal):
    pass
