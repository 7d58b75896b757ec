# Roles of the two parties that write: who publishes releases, and the mirror. Each is made where its principals are named.

locals {
  releases = "arn:${data.aws_partition.current.partition}:s3:::${var.release_bucket}"
}

data "aws_iam_policy_document" "assume_by" {
  for_each = { for party, arns in { publisher = var.publisher_principals, mirror = var.mirror_principals } : party => arns if length(arns) > 0 }

  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "AWS"
      identifiers = each.value
    }
  }
}

# kedge publish writes new objects of this role's releases, and reads and lists older ones, to make deltas. It can't delete.
data "aws_iam_policy_document" "publisher" {
  statement {
    sid       = "WriteReleases"
    actions   = ["s3:PutObject", "s3:GetObject"]
    resources = ["${local.releases}/${var.release_prefix}*"]
  }

  statement {
    sid       = "FindOlderReleases"
    actions   = ["s3:ListBucket"]
    resources = [local.releases]

    condition {
      test     = "StringLike"
      variable = "s3:prefix"
      values   = ["${var.release_prefix}*"]
    }
  }

  dynamic "statement" {
    for_each = var.release_kms_key_arn == "" ? [] : [var.release_kms_key_arn]
    content {
      sid       = "EncryptReleases"
      actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
      resources = [statement.value]
    }
  }
}

# The mirror reads manifests, to check them, and writes the snapshot for first boots (kedge mirror --snapshot).
data "aws_iam_policy_document" "mirror" {
  statement {
    sid       = "ReadManifests"
    actions   = ["s3:GetObject"]
    resources = ["${local.releases}/${var.release_prefix}*"]
  }

  dynamic "statement" {
    for_each = var.snapshot_key == "" ? [] : [var.snapshot_key]
    content {
      sid       = "WriteSnapshot"
      actions   = ["s3:PutObject", "s3:GetObject"]
      resources = ["${local.releases}/${statement.value}", "${local.releases}/${statement.value}.sig"]
    }
  }

  dynamic "statement" {
    for_each = var.release_kms_key_arn == "" ? [] : [var.release_kms_key_arn]
    content {
      sid       = "UseKey"
      actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
      resources = [statement.value]
    }
  }
}

resource "aws_iam_role" "party" {
  for_each = data.aws_iam_policy_document.assume_by

  name_prefix        = "${local.name}-${each.key}-"
  assume_role_policy = each.value.json
}

resource "aws_iam_role_policy" "party" {
  for_each = aws_iam_role.party

  name   = each.key
  role   = each.value.id
  policy = each.key == "mirror" ? data.aws_iam_policy_document.mirror.json : data.aws_iam_policy_document.publisher.json
}
