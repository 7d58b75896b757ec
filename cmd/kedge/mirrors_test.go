package main

import (
	"reflect"
	"strings"
	"testing"

	"kedge/artifact/object"
)

// A node's mirrors come from its file, or from a flag or a variable as PREFIX=MIRROR.
func TestMirrorsAreConfigured(t *testing.T) {
	t.Parallel()
	want := object.Mirrors{"s3://acme/": {"s3://euw1/", "http://127.0.0.1:65001/acme/"}, "gs://x/": {"gs://y/"}}
	c := agentDefaults()
	text := "mirrors:\n  s3://acme/: [s3://euw1/, \"http://127.0.0.1:65001/acme/\"]\n  gs://x/:\n    - gs://y/\n"
	if err := decodeAgentConfig("agent.yaml", []byte(text), &c, origins{}); err != nil {
		t.Fatal(err)
	}
	if got, err := c.Mirrors.parse(); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("the file: %v, %v", got, err)
	}
	flag, err := readMirrors("s3://acme/=s3://euw1/, s3://acme/=http://127.0.0.1:65001/acme/ gs://x/=gs://y/")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := flag.parse(); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("a flag: %v, %v", got, err)
	}
	bad := mirrorLists{"s3://acme/": {"http://10.0.0.1/acme/"}}
	if _, err := bad.parse(); err == nil || !strings.Contains(err.Error(), "s3://acme/") {
		t.Errorf("plain http from elsewhere: %v", err)
	}
	if _, err := readMirrors("s3://acme/"); err == nil || !strings.Contains(err.Error(), "PREFIX=MIRROR") {
		t.Errorf("a prefix alone: %v", err)
	}
}
