// The widgets' html-manager gives slider handles no accessible name and no spoken value.
window.addEventListener("load", () => {
  const nameHandles = () => {
    for (const slider of document.querySelectorAll(".widget-slider")) {
      const label = slider.querySelector(".widget-label")?.textContent;
      const value = slider.querySelector(".widget-readout")?.textContent;
      for (const handle of slider.querySelectorAll(".noUi-handle")) {
        if (label && !handle.hasAttribute("aria-label")) handle.setAttribute("aria-label", label);
        if (value && handle.getAttribute("aria-valuetext") !== value) {
          handle.setAttribute("aria-valuetext", value);
        }
      }
    }
  };
  const changes = { subtree: true, childList: true, characterData: true };
  new MutationObserver(nameHandles).observe(document.body, changes);
  nameHandles();
});
