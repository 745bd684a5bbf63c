// A picture over another one, uncovered as far as its slider says.
document.addEventListener("DOMContentLoaded", () => {
  for (const box of document.querySelectorAll(".before-after")) {
    const slider = box.querySelector("input");
    slider.addEventListener("input", () => box.style.setProperty("--at", `${slider.value}%`));
  }
});
