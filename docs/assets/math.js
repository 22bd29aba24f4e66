// Formulas: MathJax is loaded from this site, and only by pages that have any.
if (document.querySelector('.arithmatex')) {
  window.MathJax = {
    tex: {inlineMath: [['\\(', '\\)']], displayMath: [['\\[', '\\]']], processEscapes: true},
    options: {ignoreHtmlClass: '.*|', processHtmlClass: 'arithmatex', enableMenu: false},
  };
  const script = document.createElement('script');
  script.src = document.currentScript.src.replace('math.js', 'mathjax.js');
  document.head.append(script);
}
