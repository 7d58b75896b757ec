# What a node may do in AWS: read releases and its secrets, and say of its own group's instances that they are ready. It can't list the bucket, let
# alone write to it.

data "aws_partition" "current" {}

data "aws_region" "current" {}

data "aws_iam_policy_document" "assume" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "releases" {
  statement {
    sid       = "ReadReleases"
    actions   = ["s3:GetObject"]
    resources = ["arn:${data.aws_partition.current.partition}:s3:::${var.release_bucket}/${var.release_prefix}*"]
  }

  statement {
    sid       = "CompleteLifecycleHook"
    actions   = ["autoscaling:CompleteLifecycleAction", "autoscaling:RecordLifecycleActionHeartbeat"]
    resources = ["arn:${data.aws_partition.current.partition}:autoscaling:*:*:autoScalingGroup:*:autoScalingGroupName/${local.name}-*"]
  }

  dynamic "statement" {
    for_each = length(var.secret_parameters) > 0 ? [var.secret_parameters] : []
    content {
      sid       = "ReadParameters"
      actions   = ["ssm:GetParameter"]
      resources = [for name in statement.value : "arn:${data.aws_partition.current.partition}:ssm:*:*:parameter/${trimprefix(name, "/")}"]
    }
  }

  dynamic "statement" {
    for_each = length(var.secret_names) > 0 ? [var.secret_names] : []
    content {
      sid       = "ReadSecrets"
      actions   = ["secretsmanager:GetSecretValue"]
      resources = [for name in statement.value : "arn:${data.aws_partition.current.partition}:secretsmanager:*:*:secret:${name}"]
    }
  }

  dynamic "statement" {
    for_each = var.secret_kms_key_arn == "" ? [] : [var.secret_kms_key_arn]
    content {
      sid       = "DecryptSecrets"
      actions   = ["kms:Decrypt"]
      resources = [statement.value]
    }
  }

  dynamic "statement" {
    for_each = var.release_kms_key_arn == "" ? [] : [var.release_kms_key_arn]
    content {
      sid       = "DecryptReleases"
      actions   = ["kms:Decrypt"]
      resources = [statement.value]
    }
  }
}

resource "aws_iam_role" "node" {
  name_prefix        = "${local.name}-"
  assume_role_policy = data.aws_iam_policy_document.assume.json
}

resource "aws_iam_role_policy" "releases" {
  name   = "read-releases"
  role   = aws_iam_role.node.id
  policy = data.aws_iam_policy_document.releases.json
}

resource "aws_iam_instance_profile" "node" {
  name_prefix = "${local.name}-"
  role        = aws_iam_role.node.name
}
