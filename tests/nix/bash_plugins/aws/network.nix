{ regions }:
{
  domains = [ ".amazonaws.com" "amazonaws.com.cn" ]
    ++ map (region: "oidc.${region}.amazonaws.com") regions
    ++ [ "awsapps.com" "signin.aws.amazon.com" ];
  ports = [ 443 ];
}
