"""Root file systems that machines start from: what goes in (`recipe`), how they are made (`build`), where they lie
(`store`).
"""
