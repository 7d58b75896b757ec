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

variable "groups" {
  description = "The groups by colour. An empty one costs nothing, and is where the next image goes first."
  type = map(object({
    min_size      = number
    max_size      = number
    image_id      = optional(string)
    instance_type = optional(string)
    warm_pool = optional(object({
      min_size          = number
      pool_state        = optional(string, "Stopped")
      reuse_on_scale_in = optional(bool, false)
    }))
  }))
  default = {
    blue  = { min_size = 2, max_size = 6 }
    green = { min_size = 0, max_size = 0 }
  }
}

variable "subnet_ids" {
  type = list(string)
}

variable "security_group_ids" {
  type = list(string)
}

variable "vpc_id" {
  description = "The VPC of the subnets: for target groups and the endpoint of S3."
  type        = string
  default     = null
}

variable "traffic" {
  description = "The application's port and protocol, if a load balancer sends requests to it."
  type = object({
    port     = number
    protocol = optional(string, "HTTP")
  })
  default = null
}

variable "ready_port" {
  description = "The port of the agent's /ready, as in ../cloud-init. Let the load balancer's security group reach it."
  type        = number
  default     = 7070
}

variable "replace_unready" {
  description = "End instances that the load balancer finds unready. A release whose checks fail everywhere then ends all of them."
  type        = bool
  default     = false
}

variable "route_table_ids" {
  description = "Route tables of the subnets, for a gateway endpoint of S3; none: the VPC has one, or needs none."
  type        = list(string)
  default     = []
}

variable "publisher_principals" {
  description = "ARNs that may assume the publisher's role, as a CI's; none: no such role is made."
  type        = list(string)
  default     = []
}

variable "mirror_principals" {
  description = "ARNs that may assume the mirror's role; none: no such role is made."
  type        = list(string)
  default     = []
}

variable "snapshot_key" {
  description = "The object in the release bucket that kedge mirror --snapshot writes; empty: none."
  type        = string
  default     = ""
}

variable "secret_parameters" {
  description = "Parameters of Systems Manager that nodes may read, as in /prod/db or /prod/*. Beside secrets in agent.yaml."
  type        = list(string)
  default     = []
}

variable "secret_names" {
  description = "Secrets of Secrets Manager that nodes may read, as in prod/db-?????? (AWS adds six characters)."
  type        = list(string)
  default     = []
}

variable "secret_kms_key_arn" {
  description = "The key that these are encrypted with, if it is one of your own."
  type        = string
  default     = ""
}

variable "boot_seconds" {
  description = "How long a node may take from launch until it has converged."
  type        = number
  default     = 900
}

variable "termination_seconds" {
  description = "How long an instance stays after the load balancer has let go of it, for its last logs; 0: not at all."
  type        = number
  default     = 0
}
