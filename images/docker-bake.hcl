# docker buildx bake --file images/docker-bake.hcl [TARGET...], in the repository's root. Without Docker: images/build.sh.
variable "REGISTRY" {
  default = ""
}
variable "VERSION" {
  default = "0.1.0"
}
variable "REVISION" {
  default = "unknown"
}
# cuda or cpu
variable "TORCH" {
  default = "cuda"
}

group "default" {
  targets = ["vlmflow-data", "vlmflow-ocr", "vlmflow-train", "vlmflow-services"]
}

target "common" {
  context = "."
  args = {
    VERSION  = VERSION
    REVISION = REVISION
  }
}

target "vlmflow-data" {
  inherits   = ["common"]
  dockerfile = "images/data.Containerfile"
  tags       = ["${REGISTRY}vlmflow-data:${VERSION}"]
}

target "vlmflow-ocr" {
  inherits   = ["common"]
  dockerfile = "images/ocr.Containerfile"
  tags       = ["${REGISTRY}vlmflow-ocr:${VERSION}"]
}

target "vlmflow-train" {
  inherits   = ["common"]
  dockerfile = "images/train.Containerfile"
  args = {
    TORCH = TORCH
  }
  tags = ["${REGISTRY}vlmflow-train:${VERSION}"]
}

target "vlmflow-services" {
  inherits   = ["common"]
  dockerfile = "images/services.Containerfile"
  tags       = ["${REGISTRY}vlmflow-services:${VERSION}"]
}
