module kedge-tools/s3

go 1.26.0
