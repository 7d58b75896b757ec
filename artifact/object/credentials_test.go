package object

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// The SDK has no type for it, so its text is what tells.
func TestMissingCredentialsAreNamed(t *testing.T) {
	t.Parallel()
	client := s3.New(s3.Options{
		Region:       "us-east-1",
		BaseEndpoint: aws.String("http://127.0.0.1:1"),
		Retryer:      aws.NopRetryer{},
		Credentials: aws.NewCredentialsCache(aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{}, errors.New("no role")
		})),
	})
	_, err := client.GetObject(t.Context(), &s3.GetObjectInput{Bucket: aws.String("b"), Key: aws.String("k")})
	if err = s3Error(err); err == nil || !strings.HasPrefix(err.Error(), "no AWS credentials (AWS_ACCESS_KEY_ID ") || !strings.HasSuffix(err.Error(), ": no role") {
		t.Errorf("%v; want it to say what is missing", err)
	}
	if !errors.Is(err, ErrCredentials) {
		t.Errorf("%v is not ErrCredentials, so no caller can say what to do", err)
	}
	if trouble := new(transientError); !errors.As(err, &trouble) {
		t.Errorf("%v is for good; an instance's role takes a moment at boot", err)
	}
}

// Trouble with credentials and keys is told as what it is, with the call, the credential and S3's own message, and
// never as a missing object: the release is not to blame.
func TestTroubleWithRightsIsTold(t *testing.T) {
	t.Parallel()
	answer := func(status int, code, message string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/xml")
			w.WriteHeader(status)
			fmt.Fprintf(w, "<Error><Code>%s</Code><Message>%s</Message></Error>", code, message)
		}
	}
	for _, c := range []struct {
		answer http.HandlerFunc
		is     error
		says   []string
	}{
		{answer(403, "AccessDenied", "User: arn:aws:iam::1:role/web is not authorized to perform: s3:GetObject"), ErrDenied,
			[]string{"GetObject", "role/web is not authorized", "access key AKIA", "from StaticCredentials", "s3:ListBucket"}},
		{answer(403, "AccessDenied", "not authorized to perform: kms:Decrypt on this resource"), ErrDenied, []string{"kms:Decrypt", "the key's policy"}},
		{answer(400, "KMS.DisabledException", "key is disabled"), ErrDenied,
			[]string{"could not use the key that encrypts the object", "key is disabled"}},
		{answer(403, "ExpiredToken", "The provided token has expired."), ErrDenied, []string{"ExpiredToken The provided token has expired"}},
	} {
		server := httptest.NewServer(c.answer)
		client := New(Config{S3: &S3Config{Endpoint: server.URL, Region: "us-east-1", AccessKey: "AKIA", SecretKey: "s3cret"}})
		_, err := client.ReadAll(t.Context(), "s3://b/k", 10)
		server.Close()
		if !errors.Is(err, c.is) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%v, want %v", err, c.is)
		}
		for _, want := range c.says {
			if !strings.Contains(fmt.Sprint(err), want) {
				t.Errorf("%v doesn't say %q", err, want)
			}
		}
	}
}

// The metadata service's own 404 is no missing object.
func TestMetadataServiceIsNotTheObject(t *testing.T) {
	metadata := httptest.NewServer(http.NotFoundHandler())
	defer metadata.Close()
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_EC2_METADATA_DISABLED"} {
		t.Setenv(name, "")
	}
	t.Setenv("HOME", t.TempDir())
	t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.URL)
	t.Setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
	said, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer said.Close()
	defer func(was *os.File) { os.Stderr = was }(os.Stderr)
	os.Stderr = said // where AWS's code writes unless it is told otherwise
	ctx := t.Context()
	client := New(Config{})
	s, err := client.s3.get(ctx)
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.client.GetObject(ctx, &s3.GetObjectInput{Bucket: aws.String("b"), Key: aws.String("k")})
	err = s.fail(ctx, err)
	if errors.Is(err, ErrNotFound) || !errors.As(err, new(*transientError)) {
		t.Errorf("%v", err)
	}
	for _, want := range []string{"no AWS credentials", "AWS_ACCESS_KEY_ID not set", "credentials can't be read", "the instance's role was asked for"} {
		if !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("%v doesn't say %q", err, want)
		}
	}
	if noise, err := os.ReadFile(said.Name()); err != nil || len(noise) > 0 {
		t.Errorf("on standard error: %s, %v", noise, err)
	}
}

// A store without conditional PUT is named as one, and there is a way around.
func TestStoreWithoutConditionalPut(t *testing.T) {
	t.Parallel()
	var stored string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method != http.MethodPut && stored == "":
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, "<Error><Code>NoSuchKey</Code></Error>")
		case r.Method != http.MethodPut:
			http.ServeContent(w, r, "", time.Time{}, strings.NewReader(stored))
		case r.Header.Get("If-None-Match") != "":
			w.WriteHeader(http.StatusNotImplemented)
			fmt.Fprint(w, "<Error><Code>NotImplemented</Code><Message>A header implies functionality that is not implemented</Message></Error>")
		default:
			data, _ := io.ReadAll(r.Body)
			stored = string(data)
		}
	}))
	defer server.Close()
	config := Config{S3: &S3Config{Endpoint: server.URL, Region: "us-east-1", AccessKey: "AKIA", SecretKey: "s3cret"}}
	put := func(text string) error {
		return New(config).Put(t.Context(), "s3://b/k", strings.NewReader(text), int64(len(text)), PutOptions{})
	}
	if err := put("one"); err == nil || !strings.Contains(err.Error(), "no conditional PUT") || !strings.Contains(err.Error(), "--unconditional-put") {
		t.Errorf("%v", err)
	}
	config.UnconditionalPut = true
	if err := put("one"); err != nil || stored != "one" {
		t.Errorf("stored %q, %v", stored, err)
	}
	if err := put("two"); !errors.Is(err, ErrExists) || stored != "one" {
		t.Errorf("over another's: stored %q, %v", stored, err)
	}
}
