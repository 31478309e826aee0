// The camera: live where the browser allows it (https or this machine), else the phone's own camera app.

const $ = (id) => document.getElementById(id);
let stream = null;
let facing = "environment";

const stop = () => { stream?.getTracks().forEach((track) => track.stop()); stream = null; };

async function start() {
  stop();
  $("viewer-note").hidden = true;
  $("shoot").disabled = true;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: facing, width: { ideal: 1920 } } });
    if (!$("viewer").open) return stop();
    $("video").srcObject = stream;
    await $("video").play();
    $("shoot").disabled = false;
  } catch (error) {
    const why = { NotAllowedError: "The browser was not allowed to use the camera.", NotFoundError: "There is no camera." };
    $("viewer-note").textContent = why[error.name] ?? "The camera cannot be used.";
    $("viewer-note").hidden = false;
  }
}

/** Hands every picture that is taken to `take`, as a File. */
export function camera(take) {
  $("camera").addEventListener("click", () => {
    if (!navigator.mediaDevices?.getUserMedia) { $("capture").click(); return; }
    $("viewer").showModal();
    start();
  });
  $("capture").addEventListener("change", () => { take([...$("capture").files]); $("capture").value = ""; });
  $("turn").addEventListener("click", () => { facing = facing === "user" ? "environment" : "user"; start(); });
  $("viewer-close").addEventListener("click", () => $("viewer").close());
  $("viewer").addEventListener("close", stop);
  $("shoot").addEventListener("click", () => {
    const video = $("video");
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    const stamp = new Date().toLocaleTimeString("en-GB").replaceAll(":", ".");
    canvas.toBlob((blob) => {
      $("viewer").close();
      if (blob) take([new File([blob], `camera ${stamp}.jpg`, { type: "image/jpeg" })]);
    }, "image/jpeg", 0.95);
  });
}
