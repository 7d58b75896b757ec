package artifact

import (
	"crypto/sha256"
	"errors"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"kedge/artifact/object"
	"kedge/artifact/objecttest"
	"kedge/deployments"
)

// A manifest's key that each release overwrites: an older pointer is found among the bucket's versions, if it keeps
// any, and else the error says what is wrong with such keys.
func TestOverwrittenManifest(t *testing.T) {
	t.Setenv("VGW_VERSIONING_DIR", t.TempDir())
	server := objecttest.Start(t)
	client := server.Client()
	env := map[string]string{}
	for _, kv := range server.Env() {
		name, value, _ := strings.Cut(kv, "=")
		env[name] = value
	}
	admin := s3.New(s3.Options{
		BaseEndpoint: aws.String(server.Endpoint()), UsePathStyle: true, Region: env["AWS_REGION"],
		Credentials: credentials.NewStaticCredentialsProvider(env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"], ""),
	})
	bucket := strings.TrimSuffix(strings.TrimPrefix(server.URL(""), "s3://"), "/")
	write := func(key, text string) deployments.Pointer {
		t.Helper()
		if err := client.Replace(t.Context(), server.URL(key), []byte(text), ""); err != nil {
			t.Fatal(err)
		}
		return deployments.Pointer{URL: server.URL(key), Digest: sha256.Sum256([]byte(text))}
	}
	// Without versions.
	lost := write("plain/manifest.yml", "one")
	write("plain/manifest.yml", "two")
	_, err := ReadManifest(t.Context(), client, lost)
	const hint = "a key of its own, or a bucket that keeps versions"
	if !errors.Is(err, deployments.ErrDigest) || !strings.Contains(err.Error(), hint) {
		t.Errorf("overwritten: %v", err)
	}

	_, err = admin.PutBucketVersioning(t.Context(), &s3.PutBucketVersioningInput{
		Bucket: &bucket, VersioningConfiguration: &types.VersioningConfiguration{Status: types.BucketVersioningStatusEnabled},
	})
	if err != nil {
		t.Fatal(err)
	}
	one := write("role/manifest.yml", "one")
	write("role/manifest.yml", "two")
	write("role/manifest.yml", "three")
	write("role/manifest.yml.other", "four")
	if raw, err := ReadManifest(t.Context(), client, one); err != nil || string(raw) != "one" {
		t.Errorf("an older version: %q, %v", raw, err)
	}
	urls, err := client.Versions(t.Context(), one.URL, 9)
	if err != nil || len(urls) != 2 {
		t.Fatalf("versions: %v, %v", urls, err)
	}
	for _, url := range urls {
		if err := deployments.CheckURL(url); err != nil || !deployments.FromSource(url, []string{server.URL("role")}) {
			t.Errorf("%s: %v", url, err)
		}
	}
	// A version may be named in a pointer.
	if raw, err := ReadManifest(t.Context(), client, deployments.Pointer{URL: urls[1], Digest: one.Digest}); err != nil || string(raw) != "one" {
		t.Errorf("by its version: %q, %v", raw, err)
	}
	if err := client.Put(t.Context(), urls[0], strings.NewReader("x"), 1, object.PutOptions{}); err == nil {
		t.Error("a version was written")
	}
	one.Digest[0]++
	if _, err := ReadManifest(t.Context(), client, one); !errors.Is(err, deployments.ErrDigest) {
		t.Errorf("no version has it: %v", err)
	}
}
