// Font Awesome would rewrite the <i> icons inside widgets, which breaks the Play widget.
window.FontAwesomeConfig = { observeMutations: false };
