# AutoScaling groups of one stage and role, by colour (prod-web-blue, prod-web-green), whose nodes converge by themselves. Nothing here
# names a release, so a deployment never touches it.

terraform {
  required_version = ">= 1.5"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.0"
    }
  }
}

locals {
  name = "${var.stage}-${var.role}"
}

resource "aws_launch_template" "node" {
  for_each = var.groups

  name_prefix            = "${local.name}-${each.key}-"
  image_id               = coalesce(each.value.image_id, var.image_id)
  instance_type          = coalesce(each.value.instance_type, var.instance_type)
  vpc_security_group_ids = var.security_group_ids
  update_default_version = true

  iam_instance_profile {
    arn = aws_iam_instance_profile.node.arn
  }

  # IMDSv2 alone, and not beyond the machine itself: a request forged through an application must not read the role's credentials.
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
    # The agent (ec2: true) reads its stage and roles from the tags below, without a right to ask EC2's API for them.
    instance_metadata_tags = "enabled"
  }

  user_data = base64encode(var.user_data)

  # Both colours have the same stage and role: they run the same units.
  tag_specifications {
    resource_type = "instance"
    tags = {
      Name          = "${local.name}-${each.key}"
      "kedge:stage" = var.stage
      "kedge:roles" = var.role
    }
  }
}

resource "aws_autoscaling_group" "nodes" {
  for_each = var.groups

  name_prefix         = "${local.name}-${each.key}-"
  min_size            = each.value.min_size
  max_size            = each.value.max_size
  vpc_zone_identifier = var.subnet_ids
  target_group_arns   = [for color, group in aws_lb_target_group.nodes : group.arn if color == each.key]

  # EC2: the group replaces machines that are broken. What a release breaks, kedge takes back, and a node that drains for a switch
  # answers 503 on purpose. With ELB the group would end nodes in mid-deployment, and all of them for a check that they share.
  health_check_type         = var.replace_unready ? "ELB" : "EC2"
  health_check_grace_period = var.boot_seconds

  # An instance is in service only once it has converged: no more warm-up is needed than what metrics take to settle.
  default_instance_warmup   = 60
  wait_for_capacity_timeout = "${var.boot_seconds + 300}s"

  # A new instance is in service when its agent has completed this (KEDGE_LIFECYCLE_HOOK=converged): after its first convergence. One
  # that doesn't converge is replaced. Heartbeats keep it waiting meanwhile, so this bounds how long a dead one waits.
  initial_lifecycle_hook {
    name                 = "converged"
    lifecycle_transition = "autoscaling:EC2_INSTANCE_LAUNCHING"
    default_result       = "ABANDON"
    heartbeat_timeout    = var.boot_seconds
  }

  # An instance that ends has been out of the load balancer for a while. Nothing completes this: it is the time for what the machine
  # has yet to send, as its last logs.
  dynamic "initial_lifecycle_hook" {
    for_each = var.termination_seconds > 0 ? [var.termination_seconds] : []
    content {
      name                 = "ending"
      lifecycle_transition = "autoscaling:EC2_INSTANCE_TERMINATING"
      default_result       = "CONTINUE"
      heartbeat_timeout    = initial_lifecycle_hook.value
    }
  }

  # Its instances converge before they are stopped, and again when they are started: the hook above holds for both.
  dynamic "warm_pool" {
    for_each = each.value.warm_pool == null ? [] : [each.value.warm_pool]
    content {
      min_size   = warm_pool.value.min_size
      pool_state = warm_pool.value.pool_state
      instance_reuse_policy {
        reuse_on_scale_in = warm_pool.value.reuse_on_scale_in
      }
    }
  }

  # A new image or user data replaces the nodes, a few at a time. Each new one has to converge first, so a bad image stops the
  # refresh, and takes it back.
  instance_refresh {
    strategy = "Rolling"
    preferences {
      min_healthy_percentage = 100
      max_healthy_percentage = 110
      instance_warmup        = 0
      skip_matching          = true
      auto_rollback          = true
    }
  }

  launch_template {
    id      = aws_launch_template.node[each.key].id
    version = aws_launch_template.node[each.key].latest_version
  }

  lifecycle {
    create_before_destroy = true
    # What scales the group sets it.
    ignore_changes = [desired_capacity]
  }
}
