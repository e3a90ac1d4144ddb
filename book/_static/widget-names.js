// The widgets' html-manager gives slider handles and the player's buttons no accessible name, and
// sliders no spoken value.
window.addEventListener("load", () => {
  const icons = { "fa-play": "play", "fa-pause": "pause", "fa-stop": "stop", "fa-retweet": "repeat" };
  const name = (element, attribute, words) => {
    if (words && element.getAttribute(attribute) !== words) element.setAttribute(attribute, words);
  };
  const nameHandles = (slider) => {
    const label = slider.querySelector(".widget-label")?.textContent;
    const value = slider.querySelector(".widget-readout")?.textContent;
    for (const handle of slider.querySelectorAll(".noUi-handle")) {
      name(handle, "aria-label", label);
      name(handle, "aria-valuetext", value);
    }
  };
  const nameButton = (button) => {
    const icon = Object.keys(icons).find((icon) => button.querySelector(`.${icon}`));
    name(button, "aria-label", icons[icon]);
  };
  const nameAll = () => {
    document.querySelectorAll(".widget-slider").forEach(nameHandles);
    document.querySelectorAll(".widget-play button").forEach(nameButton);
  };
  const changes = { subtree: true, childList: true, characterData: true, attributeFilter: ["class"] };
  new MutationObserver(nameAll).observe(document.body, changes);
  nameAll();
});
