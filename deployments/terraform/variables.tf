variable "stage" {
  description = "The stage of these nodes, as in prod."
  type        = string
}

variable "role" {
  description = "The role of these nodes, as in web."
  type        = string
}

variable "image_id" {
  description = "An image with kedge, Consul's agent and kedge's systemd units."
  type        = string
}

variable "user_data" {
  description = "cloud-init's user data: see ../cloud-init/user-data.yaml."
  type        = string
}

variable "release_bucket" {
  description = "The bucket that releases are published to."
  type        = string
}

variable "release_prefix" {
  description = "The prefix of this role's releases in the bucket, with a slash at its end; empty: the whole bucket."
  type        = string
  default     = ""

  validation {
    condition     = var.release_prefix == "" || endswith(var.release_prefix, "/")
    error_message = "Without a slash at its end, web would open web-secrets as well."
  }
}

variable "release_kms_key_arn" {
  description = "The key that the bucket is encrypted with, if it has one of its own."
  type        = string
  default     = ""
}

variable "instance_type" {
  type    = string
  default = "t4g.small"
}

variable "min_size" {
  type    = number
  default = 2
}

variable "max_size" {
  type    = number
  default = 6
}

variable "subnet_ids" {
  type = list(string)
}

variable "security_group_ids" {
  type = list(string)
}

variable "target_group_arns" {
  description = "Target groups whose health check asks the agent's /ready, on its port (7070 in ../cloud-init), not the application's."
  type        = list(string)
  default     = []
}

variable "boot_seconds" {
  description = "How long a node may take from launch until it has converged."
  type        = number
  default     = 900
}
